import pytest
from hostile import SETTINGS
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.http.opt_out import OPT_OUT, opt_out_directive


@pytest.mark.parametrize("directive", sorted(OPT_OUT))
@pytest.mark.parametrize(
    "value",
    ["{}", " {} ", "nofollow, {}", "{}, nosnippet", "roclip: {}", "RoCLIP : all, {}", "*: {}", "roclip/0.1: {}"],
)
def test_opt_out_is_heard(directive, value):
    assert opt_out_directive([value.format(directive)], "roclip") == directive
    assert opt_out_directive(["nosnippet", value.format(directive).upper()], "roclip") == directive


@pytest.mark.parametrize(
    "value",
    [
        "",
        "all",
        "nofollow, noarchive",
        "otherbot: noai",
        "otherbot: nofollow, noai, noimageai",
        "roclip: nofollow, otherbot: noai",
        "noaifoo",
        "max-image-preview: none",
        "unavailable_after: 25 Jun 2027 15:00:00 PST",
        "roclipper: noai",
        ", ,:",
    ],
)
def test_what_is_not_for_us_is_no_opt_out(value):
    assert opt_out_directive([value], "roclip") == ""


@pytest.mark.parametrize(
    "value",
    [
        "unavailable_after: Fri, 25 Jun 2027 15:00:00 GMT, noai",
        "unavailable_after: Friday, 25-Jun-27 15:00:00 UTC, noai",
        "unavailable_after: 2027-06-25T15:00:00+00:00, noai",
        "max-snippet: 20, noai",
        "otherbot: nofollow, roclip: noai",
    ],
)
def test_directives_with_a_value_are_no_crawlers(value):
    assert opt_out_directive([value], "roclip") == "noai"


def test_another_header_is_for_everybody_again():
    assert opt_out_directive(["otherbot: noai", "noml"], "roclip") == "noml"
    assert opt_out_directive(["otherbot: noai", "otherbot: noml"], "roclip") == ""


@settings(max_examples=200, **SETTINGS)
@given(st.lists(st.text("noai:,roclip* \t/_-;" + chr(0xFC)), max_size=3))
def test_any_header_is_read(values):
    assert opt_out_directive(values, "roclip") in {"", *OPT_OUT}
