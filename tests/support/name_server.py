"""A DNS server on loopback (UDP) that says what a test tells it."""

import contextlib
import socket
import threading
from collections import Counter

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


class NameServer:
    """Answers questions for A and AAAA.

    `names` maps a name to its answers, one list of addresses for each time that it is asked for A; the last one stays. `None`
    is silence. An address may also be a name: an alias. Other names do not exist. `ttl_s` holds for all.
    """

    def __init__(self, names: dict[str, list[list[str] | None]], ttl_s: int = 60):
        self.names = names
        self.ttl_s = ttl_s
        self.asked: Counter[str] = Counter()
        """How often each name was asked for its A."""
        self.hold = threading.Event()
        """While it is not set, no answer leaves."""
        self.hold.set()
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.settimeout(0.05)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> "NameServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.hold.set()
        self._ending.set()
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError, dns.exception.DNSException):
                wire, client = self._socket.recvfrom(4096)
                response = self._answer(dns.message.from_wire(wire))
                self.hold.wait()
                if response is not None:
                    self._socket.sendto(response.to_wire(), client)

    def _answer(self, query: dns.message.Message) -> dns.message.Message | None:
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        is_first = question.rdtype == dns.rdatatype.A
        turn = self.asked[name] if is_first else self.asked[name] - 1
        self.asked[name] += is_first
        response = dns.message.make_response(query)
        response.flags |= dns.flags.RA
        if name not in self.names:
            response.set_rcode(dns.rcode.NXDOMAIN)
            return response
        answers = self.names[name]
        addresses = answers[min(turn, len(answers) - 1)]
        if addresses is None:
            return None
        for address in addresses:
            kind = "AAAA" if ":" in address else "A" if address[-1].isdigit() else "CNAME"
            if kind in ("CNAME", dns.rdatatype.to_text(question.rdtype)):
                response.answer.append(dns.rrset.from_text(question.name, self.ttl_s, "IN", kind, address))
        return response
