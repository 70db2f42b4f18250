"""An experiment's file: what is shared, what an arm may change, what the messages say."""

from pathlib import Path

import pytest
from kit import REPOSITORY

from roclip.config import model_file
from roclip.errors import ConfigError
from roclip.report.experiment import Experiment, load_experiment

TEXT = """
name: both
data: {scenes: 100}
pool: {size: 32, match_every: 2}
seeds: [3, 4]
arms:
  clip: {method: clip}
  paper: {set: {pool: {match_every: 3, filter_frac: [0.1, 0.0]}, train: {lr: 0.1}}}
sweep:
  few: {attacks: {backdoors: [{kind: patch, count: 5}]}}
  many: {attacks: {backdoors: [{kind: patch, count: 50}]}}
"""
EXPERIMENTS = sorted((REPOSITORY / "configs" / "experiments").glob("*.yaml"))


def load(folder: Path, *overrides: str, text: str = TEXT) -> Experiment:
    path = folder / "both.yaml"
    path.write_text(text)
    return load_experiment(path, overrides)


def test_every_corpus_has_its_seed_its_poisons_and_all_arms(tmp_path):
    experiment = load(tmp_path, "points=[few,many]")
    assert [corpus.name for corpus in experiment.corpora] == ["few-seed3", "few-seed4", "many-seed3", "many-seed4"]
    for corpus in experiment.corpora:
        assert corpus.config.attacks.by_name["backdoor"].count == {"few": 5, "many": 50}[corpus.point]
        clip, paper = corpus.trainings
        assert clip.config.seed == paper.config.seed == corpus.seed
        assert (clip.method, paper.method) == ("clip", "roclip")
        assert (clip.config.pool.match_every, paper.config.pool.match_every) == (2, 3)
        assert (clip.config.train.lr, paper.config.train.lr) == (5e-4, 0.1)
        assert paper.config.pool.size == 32
        assert clip.config.attacks == paper.config.attacks == corpus.config.attacks


def test_first_point_is_trained_unless_points_are_named_and_no_sweep_is_one_point(tmp_path):
    assert {corpus.point for corpus in load(tmp_path).corpora} == {"few"}
    (corpus,) = load(tmp_path, "seeds=[0]", text=TEXT[: TEXT.index("sweep")]).corpora
    assert corpus.name == "data-seed0"


def test_overrides_reach_the_experiment_the_shared_config_and_one_arm(tmp_path):
    experiment = load(tmp_path, "seeds=[7]", "data.limit=9", "arms.paper.set.pool.size=8", "sweep.few.data.scenes=11")
    (corpus,) = experiment.corpora
    assert (corpus.seed, corpus.config.data.limit, corpus.config.data.scenes) == (7, 9, 11)
    assert [training.config.pool.size for training in corpus.trainings] == [32, 8]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("arms.paper.set.pool.sise=7", r"arms\.paper\.set: unknown key 'pool\.sise'. Did you mean 'pool\.size'"),
        ("arms.paper.mthod=clip", r"Did you mean 'arms\.paper\.method'"),
        ("arms.paper.set.train.epochs=9", r"train\.epochs, which all arms share"),
        ("arms.paper.set.data.scenes=9", r"got data, which all arms share"),
        ("arms.paper.set.seed=9", r"got seed, which all arms share"),
        ("arms.origin.method=clip", r"arms: expected a name .* got 'origin'"),
        ("points=[none]", r"points: expected some of few, many"),
        ("seeds=[1,1]", r"different seeds"),
        ("seed=1", r"expected seeds="),
        ("sedes=[1]", r"unknown key 'sedes'"),
        ("sweep.few=3", r"sweep\.few: expected settings"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_key(tmp_path, override, says):
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, override)


def test_preset_is_not_an_experiment(tmp_path):
    with pytest.raises(ConfigError, match=r"expected `arms`, a mapping"):
        load(tmp_path, text="name: demo\ndata: {scenes: 9}\n")
    with pytest.raises(ConfigError, match="no such experiment"):
        load_experiment(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiment_loads_with_every_point_and_its_own_model(path: Path):
    names = ",".join(load_experiment(path).protocol.sweep)
    experiment = load_experiment(path, [f"points=[{names}]"])
    assert len(experiment.protocol.seeds) == 3
    assert experiment.arms[0] == "clip"
    assert all(model_file(corpus.config) for corpus in experiment.corpora)
