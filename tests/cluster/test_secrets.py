"""What must stay secret: no credential gets into a config, Ray's token is its owner's, an open dashboard is refused."""

import contextlib
import http.server
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from kit import environment, preset

from cluster.cli.main import guarded
from cluster.jobs import jobs
from cluster.ray import connect
from cluster.ray.session import keep_config
from roclip.config import dump_config, load_config, parse_config
from roclip.config.secrets import private_directory
from roclip.errors import ConfigError, StageError

PLAIN = "name: x\nmodel: {name: tiny}\ndata: {shards: x}\n"
SECRET = "wJalrXUtnFEMI"


@pytest.mark.parametrize(
    "override",
    [
        f"data.shards=s3://KEY:{SECRET}@bucket/shards",
        f"data.urls=https://{SECRET}@host/list.parquet",
        f"data.urls=a.parquet::https://store/list.parquet?X-Amz-Signature={SECRET}",
        f"data.urls=https://account.blob.core.windows.net/list?sv=1&sig={SECRET}",
        f"data.urls=https://host/list?access_token={SECRET}",
        f"train.checkpoint_store=gs://me:{SECRET}@bucket/c",
        f"ingest.policy.proxy=http://me:{SECRET}@egress:3128",
        f"cluster.address=http://{SECRET}@head:8265",
        f"oracle.label_map={{a: 'ftp://me:{SECRET}@host'}}",
        f"evaluate.templates=['{{}} s3://me:{SECRET}@host']",
        "data.cache_dir=/tmp/AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_config_with_a_secret_is_refused_and_does_not_repeat_it(override, tmp_path):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match="expected no secret") as refused:
        load_config(preset(tmp_path, PLAIN), [override])
    assert key in str(refused.value)
    assert SECRET not in str(refused.value)
    assert "AKIA" not in str(refused.value)


def test_option_with_a_secret_is_refused(tmp_path, capsys):
    assert guarded(["oracle", str(preset(tmp_path, PLAIN)), "--data", f"s3://me:{SECRET}@bucket"]) == 2
    assert "--data: expected no secret" in (said := capsys.readouterr().err)
    assert SECRET not in said


@pytest.mark.parametrize(
    "override",
    [
        "data.shards=s3://bucket/shards",
        "data.shards=hdfs://user@name-node:8020/shards",
        "data.urls=https://host/list.parquet?version=3",
        "ingest.policy.contact=https://my.lab/crawler?key_facts=1",
        "ingest.policy.contact=crawler@my.lab",
        "data.shards=cc3m/{00000..00331}.tar::s3://mine/cc12m",
    ],
)
def test_config_without_a_secret_is_taken(override, tmp_path):
    assert load_config(preset(tmp_path, PLAIN), [override])


def test_environment_does_not_get_into_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    path = preset(tmp_path, PLAIN)
    for value in ("${oc.env:AWS_SECRET_ACCESS_KEY}", "${data.urls}", "${oc.decode:x}"):
        with pytest.raises(ConfigError, match="expected a plain value") as refused:
            load_config(path, [f"data.cache_dir={value}"])
        assert SECRET not in str(refused.value)
    with pytest.raises(ConfigError, match="expected a plain value"):
        parse_config(dump_config(load_config(path)).replace("cache_dir: ''", "cache_dir: ${oc.env:HOME}"))


@pytest.mark.parametrize(
    "line",
    [
        "name: !!python/object/apply:os.system ['touch {file}']",
        "name: !!python/object/new:os.system ['touch {file}']",
        "name: !!python/name:os.system",
        "data: !!python/object:roclip.config.Config {{}}",
        "name: ${{oc.create:'!!python/object/apply:os.system [touch {file}]'}}",
    ],
)
def test_yaml_runs_no_code(line, tmp_path):
    file = tmp_path / "ran"
    path = preset(tmp_path, PLAIN + line.format(file=file) + "\n" if "data" not in line else line.format(file=file))
    with pytest.raises(ConfigError):
        load_config(path)
    assert not file.exists()


def test_token_file_is_made_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0)
    try:
        connect.ensure_token()
    finally:
        os.umask(before)
    file = tmp_path / ".ray" / "auth_token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert len(connect.find_token()) == 64
    assert os.listdir(file.parent) == ["auth_token"]
    made = file.read_text()
    file.chmod(0o644)  # as Ray leaves it
    connect.ensure_token()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text() == made


def test_token_comes_from_where_ray_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert connect.find_token() == ""
    (tmp_path / "token").write_text("from-file\n")
    assert connect.find_token() == "from-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "from-environment")
    assert connect.find_token() == "from-environment"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to own a file as somebody else")
def test_token_file_of_somebody_else_that_all_can_read_is_refused():
    code = (
        "import os; from cluster.ray.connect import ensure_token; from roclip.errors import StageError; os.setuid(65534)\n"
        "try: ensure_token()\nexcept StageError as error: print(error)"
    )
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        token = Path(folder, "token")
        token.write_text("t")
        token.chmod(0o644)
        Path(folder).chmod(0o755)
        child = environment(RAY_AUTH_TOKEN_PATH=str(token), RAY_AUTH_MODE="token")
        done = subprocess.run([sys.executable, "-c", code], env=child, capture_output=True, text=True)
    assert "it is not ours" in done.stdout, done.stderr


def test_run_directory_is_closed_to_others_and_one_that_is_there_is_left(tmp_path):
    config = load_config(preset(tmp_path, PLAIN))
    keep_config(config, tmp_path / "runs" / "a")
    assert stat.S_IMODE((tmp_path / "runs" / "a").stat().st_mode) == 0o700
    (tmp_path / "shared").mkdir(mode=0o750)
    private_directory(tmp_path / "shared")
    assert stat.S_IMODE((tmp_path / "shared").stat().st_mode) == 0o750


class _AnswersEverybody(http.server.BaseHTTPRequestHandler):
    asked: list[str | None]

    def do_GET(self) -> None:
        self.asked.append(self.headers["Authorization"])
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def open_dashboard(host: str):
    asked: list[str | None] = []
    handler = type("Handler", (_AnswersEverybody,), {"asked": asked})
    with http.server.ThreadingHTTPServer((host, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://{host}:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def own_address() -> str:
    """An address of this machine that is not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but loopback")
        return probe.getsockname()[0]


def test_open_dashboard_that_others_reach_is_refused_before_it_sees_the_token(tmp_path, monkeypatch, capsys):
    (tmp_path / "token").write_text("t" * 64)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    config = str(preset(tmp_path, PLAIN))
    with open_dashboard(own_address()) as (address, asked):
        assert guarded(["submit", config, f"runs={tmp_path}", "--address", address]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "answers everybody" in said
    assert "RAY_AUTH_MODE=token" in said
    assert asked == [None]


def test_dashboard_that_nobody_serves_is_an_error_of_the_stage():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(StageError, match="Is the head up"):
            jobs.Jobs(f"http://127.0.0.1:{closed.getsockname()[1]}")


@pytest.mark.parametrize(
    ("host", "alone"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("192.0.2.7", False)]
)
def test_loopback_is_told_by_address(host, alone):
    assert jobs.is_loopback(host) is alone


def test_address_is_needed_and_taken_from_the_environment(monkeypatch):
    for name in jobs.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="got none"):
        jobs.Jobs()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(StageError, match=r"127\.0\.0\.1"):
            jobs.Jobs()


def test_ray_client_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="roclip submit"):
        load_config(preset(tmp_path, PLAIN), ["cluster.address=ray://head:10001"])


@pytest.mark.slow
@pytest.mark.ray
def test_local_ray_asks_for_its_token_on_loopback_only(tmp_path):
    """In a process of its own: the dashboard answers 401, every socket that listens for it is on loopback."""
    code = """
import pathlib, sys, urllib.request, urllib.error
from cluster.display import Display
from cluster.ray.session import Session
from roclip.config import environment_defaults, load_config
import ray, psutil
environment_defaults()
here = Session(load_config(sys.argv[1], ["cluster.dashboard=true"]), pathlib.Path(sys.argv[2]), Display())
here.need_ray()
url = ray._private.worker.global_worker.node.address_info["webui_url"]
host, port = url.split(":")
try:
    urllib.request.urlopen(f"http://{url}/api/version", timeout=30); print("open")
except urllib.error.HTTPError as error:
    print(error.code)
listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == int(port)}
print(sorted(listening))
lines = [" ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])]
token = pathlib.Path(sys.argv[3]).read_text()
print(len(token), any(token in line for line in lines))
ray.shutdown()
"""
    path = preset(tmp_path, PLAIN)
    token = tmp_path / "token"
    child = {k: v for k, v in environment(RAY_AUTH_TOKEN_PATH=str(token)).items() if k != "RAY_AUTH_MODE"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path), str(token)], env=child, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["401", "['127.0.0.1']", "64 False"], done.stdout + done.stderr
    assert stat.S_IMODE(Path(token).stat().st_mode) == 0o600
