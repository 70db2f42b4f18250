"""A tiny run on a real Ray, seen by a real Prometheus and, in Ray's own dashboard, by a real browser."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import pytest
from browser import browser_tab
from kit import REPOSITORY, preset
from watched import WATCHED_RUN, Head, Prometheus, names_in, promtool, ray_head, waited

from cluster.monitoring.alerts import alerts
from cluster.monitoring.grafana import dashboards
from cluster.monitoring.publisher import count, follow, labels_of
from roclip.metrics.registry import read_metrics
from roclip.metrics.series import SERIES

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPAIRED = REPOSITORY / "tests" / "golden" / "repaired"
"""What a check and a repair of the demo's `clip` left: verdict, numbers and outcome."""
RAYS_LABELS = r'(?:Component|NodeAddress|SessionName|Version|WorkerId|otel_scope_\w+)="[^"]*",?'
LOSS = "ray_roclip_train_loss_nats{"


@dataclass(frozen=True)
class Seen:
    """A run that has ended, with Prometheus still there."""

    head: Head
    prometheus: Prometheus
    run: Path
    began_s: float
    ended_s: float
    page: str
    """What the node showed Prometheus during training."""

    def has(self, expr: str) -> bool:
        return bool(self.prometheus.range(expr, self.began_s, self.ended_s))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as head:
        yield head


@pytest.fixture(scope="module")
def seen(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """One of ingest's workers is killed, and a checkpoint that was repaired is followed after it."""
    folder = tmp_path_factory.mktemp("watched")
    config = preset(folder, WATCHED_RUN.format(folder=folder, address=head.address))
    with Prometheus(head.discovery, folder) as prometheus:
        began_s = time.time()
        process = head.roclip("run", str(config))
        with ended(process):
            during(process, lambda: head.processes("ray::ingest "))[0].kill()
            page = during(process, lambda: showing(head, LOSS))
            said, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, said
        repaired = Path(shutil.copytree(REPAIRED, folder / "runs" / "repaired" / "clip"))
        with following(head, repaired, "oracle"):
            outcome = "ray_roclip_oracle_repair_attack_ratio"
            waited(lambda: prometheus.range(outcome, began_s, time.time()), "the repair")
        yield Seen(head, prometheus, folder / "runs" / "watched", began_s, time.time(), page)


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        with process:  # closes its pipes
            pass


def during(process: subprocess.Popen, found: Callable):
    """What is found while a process runs."""

    def look():
        if process.poll() is not None:
            pytest.fail(process.communicate()[0])
        return found()

    return waited(look, "in a run", within_s=600)


@contextlib.contextmanager
def following(head: Head, folder: Path, stage: str) -> Iterator[subprocess.Popen]:
    """A driver that follows a folder until the block ends."""
    driver = REPOSITORY / "tests" / "support" / "following_driver.py"
    process = subprocess.Popen(
        [sys.executable, str(driver), head.address, str(folder), stage],
        env=head.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with ended(process):
        assert process.stdout is not None
        assert process.stdout.readline() == "follows\n"
        yield process
        if process.poll() is None:
            said, _ = process.communicate("")
            assert said == "ended\n"


def showing(head: Head, words: str, run: str = "watched") -> str:
    """The page of metrics if a line of it has the words, for a run; else nothing."""
    page = head.metrics()
    return page if any(words in line and f'run="{run}"' in line for line in page.splitlines()) else ""


def ours(page: str) -> str:
    """Lines of our series, without the labels that Ray adds."""
    lines = [line for line in page.splitlines() if re.search(r"\bray_roclip_", line)]
    return "\n".join(re.sub(r",}", "}", re.sub(RAYS_LABELS, "", line)) for line in lines) + "\n"


def test_prometheus_finds_every_node_by_rays_own_list(seen):
    targets = seen.prometheus.targets()
    assert targets
    assert {target["health"] for target in targets} == {"up"}


def test_every_query_of_every_panel_returns_data(seen):
    empty = []
    for board in dashboards():
        for panel in board.panels:
            for query in panel.queries:
                expr = query.expr.replace("$__rate_interval", "1m").replace("$run", ".*").replace("$arm", ".*")
                if not panel.needs_gpu and not seen.has(expr):
                    empty.append((board.name, panel.title, expr))
    assert empty == []


def test_every_rule_is_evaluated_on_series_that_are_there(seen):
    rules = {rule["name"]: rule for rule in seen.prometheus.rules()}
    assert set(rules) == {alert.name for alert in alerts()}
    assert {name: rule.get("lastError") for name, rule in rules.items() if rule["health"] != "ok"} == {}
    names = names_in(" ".join(alert.expr for alert in alerts())) | {"up"}
    assert [name for name in names if not seen.has(name)] == []


def test_nothing_is_published_that_the_registry_lacks_and_promtool_agrees_with_it(seen):
    page = ours(seen.page)
    exposed = {series.exposed: series for series in SERIES.values()}
    for name, labels in re.findall(r"^(ray_roclip_\w+)\{(.*)\}", page, re.MULTILINE):
        assert set(re.findall(r'(\w+)="', labels)) == set(exposed[name].labels), name
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)", page, re.MULTILINE):
        assert exposed[name].kind == kind
    assert promtool("check", "metrics", stdin=page) == ""


def test_published_values_are_those_of_the_files(seen):
    rows = read_metrics(seen.run / "roclip" / "metrics.jsonl")
    losses = seen.prometheus.range(LOSS + 'run="watched"}', seen.began_s, seen.ended_s)
    shown = {float(value) for series in losses for _, value in series["values"]}
    assert shown
    assert [value for value in shown if value not in [pytest.approx(row["loss"]) for row in rows]] == []
    done = "max(max_over_time(ray_roclip_train_done_epochs[1h]))"
    (last,) = seen.prometheus.range(done, seen.ended_s, seen.ended_s)
    assert float(last["values"][-1][1]) == rows[-1]["epochs"]  # also the last, just before the actor ended
    (failures,) = seen.prometheus.range("sum(ray_roclip_ingest_task_failures_total)", seen.ended_s, seen.ended_s)
    assert float(failures["values"][-1][1]) == 1


def test_gauges_of_a_finished_run_are_gone(seen):
    assert LOSS in seen.page
    page = waited(lambda: (p := seen.head.metrics()) and not showing(seen.head, LOSS) and p, "without the run's gauges")
    left = {line.split("{")[0] for line in page.splitlines() if 'run="watched"' in line}
    assert all(name.endswith("_total") for name in left)  # Ray keeps counters, whose rate is 0


def test_gauges_of_a_dead_driver_go_and_come_back_with_the_next(seen):
    folder = seen.run / "roclip"
    with following(seen.head, folder, "training") as driver:
        waited(lambda: showing(seen.head, LOSS), "the driver's gauges")
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        waited(lambda: not showing(seen.head, LOSS), "without the dead driver's gauges")
    with following(seen.head, folder, "training"):
        waited(lambda: showing(seen.head, LOSS), "the same gauges by another driver")


def test_readings_follow_what_ranks_and_checkpoints_write(seen, tmp_path):
    folder = tmp_path / "run" / "roclip"
    shutil.copytree(seen.run / "roclip" / "log", folder / "log")
    with (folder / "log" / "ranks.log").open("a") as log:
        log.write("2026-01-01 00:00:00 rank 1 died; restart 1 of 1\n2026-01-01 00:00:09 2 ranks from step 4\n")
    before = {name: value for name, value, _ in follow(folder, "training")()}
    assert before["roclip_train_ranks"] == 2
    assert before["roclip_train_starts"] == 2
    assert not {name for name in before if name.startswith(("roclip_checkpoint_", "roclip_pool_"))}
    after = {name: value for name, value, _ in follow(seen.run / "roclip", "training")()}
    newest = seen.run / "roclip" / "checkpoints" / f"step-{after['roclip_checkpoint_step']:08d}"
    assert after["roclip_checkpoint_size_bytes"] == sum(file.stat().st_size for file in newest.iterdir())
    assert after["roclip_checkpoint_copy_failures"] == 0
    assert after["roclip_checkpoint_saves"] > 1


def test_arm_is_the_folder_below_the_run_that_is_locked(tmp_path):
    (tmp_path / "run.lock").touch()
    assert labels_of(tmp_path / "clip" / "repair" / "clip") == {"run": tmp_path.name, "arm": "clip/repair/clip"}
    assert labels_of(tmp_path / "other" / "clip") == {"run": tmp_path.name, "arm": "other/clip"}


def test_measuring_without_ray_or_with_a_wrong_label_ends_nothing():
    count("roclip_ingest_images", 3, run="none")
    count("roclip_ingest_images", 3, nonsense="none")


# ---- Ray's own dashboard ------------------------------------------------------------------------------------


def test_names_in_rays_dashboard_tell_the_story(seen):
    tasks = {task["name"] for task in seen.head.get("/api/v0/tasks?limit=1000")["data"]["result"]["result"]}
    assert {"ingest watched part 0", "ingest watched part 1", "oracle roclip prepares", "oracle roclip judges"} <= tasks
    actors = {actor["name"] for actor in seen.head.get("/api/v0/actors?limit=1000")["data"]["result"]["result"]}
    assert any(name.startswith("monitor of watched, roclip, training since") for name in actors)
    assert any(name.startswith("host rate limiter 0 of watched") for name in actors)


def test_job_says_which_run_it_is_and_ray_train_its_state(seen):
    (job,) = [job for job in seen.head.get("/api/jobs/") if job["metadata"].get("run") == "watched"]
    assert job["metadata"]["config"] == "preset.yaml"
    assert job["metadata"]["run_dir"] == str(seen.run)
    assert seen.head.token not in str(job)
    (run,) = seen.head.get("/api/train/v2/runs/v1")["train_runs"]
    assert run["status"] == "FINISHED"
    assert run["job_id"] == job["job_id"]


async def text_of(url, words, picture, profile, cookies):
    """What a page says once it has all the words; also takes a picture of it."""
    async with browser_tab(profile) as tab:
        for name, value in cookies.items():
            await tab.call("Network.setCookie", name=name, value=value, url=url)
        await tab.open(url, 1400, 1000)
        await tab.until(f"{json.dumps(list(words))}.every(word => document.body.innerText.includes(word))", 120)
        await tab.picture(picture)
        return await tab.value("document.body.innerText")


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("jobs", ["SUCCEEDED", "cluster.cli run", "Duration"]),
        ("jobs/01000000", ["Ray Core Overview", "cluster.cli run", "Finished:"]),
        ("metrics", ["Grafana", "Prometheus"]),
    ],
)
def test_pages_of_rays_dashboard_open_with_the_token(seen, tmp_path, page, words):
    picture = Path(os.environ.get("ROCLIP_PICTURES", tmp_path)) / f"ray-{page.replace('/', '-')}.png"
    cookies = {"ray-authentication-token": seen.head.token}
    text = asyncio.run(text_of(f"{seen.head.dashboard}/#/{page}", words, picture, tmp_path / "profile", cookies))
    assert "token" not in text.lower()
    pixels = cv2.imread(str(picture))
    assert pixels is not None
    assert (pixels != pixels[-1, -1]).any(axis=2).mean() > 0.01


def test_dashboard_without_the_token_shows_nothing_but_the_question_for_it(seen, tmp_path):
    url = f"{seen.head.dashboard}/#/jobs"
    text = asyncio.run(text_of(url, ["token"], tmp_path / "page.png", tmp_path / "profile", {}))
    assert "token" in text.lower()
    assert "cluster.cli" not in text
