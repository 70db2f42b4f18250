"""How the log of a job is cut into lines, and how a Ctrl-C ends reading it."""

import asyncio

import pytest

from cluster.jobs.log import Log, last_progress, printable


async def chunks(*texts: str, then: str = "ends"):
    for text in texts:
        yield text
    if then == "breaks":
        raise ConnectionError("cut")
    if then == "is silent":
        await asyncio.sleep(3600)


LINES = "Running entrypoint for job a.1: x\none\ntwo\nthrée\nfour\n"


@pytest.mark.parametrize("broken", range(0, len(LINES) + 1, 3))
@pytest.mark.parametrize("how", ["ends", "breaks", "is silent"])
def test_each_line_of_a_log_comes_once_wherever_the_connection_breaks(broken, how):
    shown: list[str] = []
    log = Log(shown.append)

    async def read() -> None:
        try:
            await log.read(chunks(LINES[: broken // 2], LINES[broken // 2 : broken], then=how), silence_timeout_s=0.01)
        except ConnectionError:
            assert how == "breaks"
        await log.read(chunks(*(LINES[i : i + 7] for i in range(0, len(LINES), 7))))

    asyncio.run(read())
    assert shown == ["one", "two", "thrée", "four"]
    log.end(LINES + "no end of line")
    assert shown[4:] == ["no end of line"]


def test_log_cannot_command_the_terminal():
    assert printable("a\x1b]0;title\x07b\tc\x9b31m") == "a�]0;title�b\tc�31m"


def test_last_progress_is_that_of_the_newest_stage():
    log = "run      x\ningest   100%  9/9 URLs\nclip       2%  epoch 1/14\nclip     rank 1 died\n"
    assert last_progress(log) == "clip       2%  epoch 1/14"
    assert last_progress("run      x\n") == ""


@pytest.mark.parametrize("closing", ["fails", "takes its time"])
@pytest.mark.parametrize("silence_timeout_s", [3600, 0.01])
def test_ctrl_c_is_not_lost_while_the_connection_is_closed(closing, silence_timeout_s):
    """`asyncio.run` turns Ctrl-C into the cancellation of what it runs."""
    waits, closes = asyncio.Event(), asyncio.Event()

    async def silent():
        try:
            waits.set()
            await asyncio.sleep(3600)
            yield ""
        finally:
            closes.set()
            if closing == "fails":
                raise ConnectionError("cut")
            await asyncio.sleep(0.2)

    async def read() -> None:
        reading = asyncio.ensure_future(Log(print).read(silent(), silence_timeout_s))
        await (closes if silence_timeout_s < 1 and closing == "takes its time" else waits).wait()
        reading.cancel()
        await reading

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(read())
