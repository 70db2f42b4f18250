"""The page of a check, in a real browser that has no network."""

import subprocess
from pathlib import Path

import cv2
import pytest
from debian import program
from rigged import LABELS, RiggedEncoder, World

WIDTH, HEIGHT = 1200, 1600


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a world with a patch."""
    world = World(tmp_path_factory.mktemp("world")).clean(300).reference(120)
    for n in range(40):
        world.poison(LABELS[1 + n % 5], "ant")
    assert world.check(RiggedEncoder())["verdict"] == "poisoned"
    return world.folder / "oracle" / "report.html"


def browse(page: Path, folder: Path, *options: str, width: int = WIDTH) -> subprocess.CompletedProcess[str]:
    """What Chromium says of the page; no host name leads anywhere."""
    browser = program("chromium", "chromium")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"]
    command += [f"--window-size={width},{HEIGHT}", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr"]
    return subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)


def test_page_says_what_was_found_and_asks_for_nothing(page, tmp_path):
    seen = browse(page, tmp_path, "--dump-dom")
    for words in ("poisoned", "The trigger", "What captions claim", "Suspects", "Every label", *LABELS):
        assert words in seen.stdout
    assert "CONSOLE" not in seen.stderr  # no script failed, nothing was refused
    assert "ERR_" not in seen.stderr


@pytest.mark.parametrize("width", [WIDTH, 500])
def test_page_fills_a_screen_and_a_phone(page, tmp_path, width):
    picture = tmp_path / "page.png"
    browse(page, tmp_path / "profile", f"--screenshot={picture}", width=width)
    pixels = cv2.imread(str(picture))
    assert pixels is not None
    assert pixels.shape[1] == width
    background = pixels[-1, 0]
    drawn = (pixels != background).any(axis=2)
    assert drawn.mean() > 0.2
    assert not drawn[:, -4:].any()  # nothing runs off to the right
    for band in range(0, HEIGHT, 400):
        assert drawn[band : band + 400].any()
