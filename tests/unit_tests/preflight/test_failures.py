from argparse import Namespace
from pathlib import Path

import launch
import pytest
from megatron.core.utils import divide

from megatron_echo.config import EchoTransformerConfig
from megatron_echo.preflight import failures

ARGS = Namespace(load="somewhere", save=None)


def caught(function, *values: object, **fields: object) -> Exception:
    with pytest.raises((AssertionError, TypeError, ValueError)) as error:
        function(*values, **fields)
    return error.value


def test_a_refusal_of_megatron_is_a_sentence_with_its_place() -> None:
    refusal = caught(divide, 3, 2)
    found = failures.explain(refusal, ARGS, is_training=False)
    assert found is not None
    assert found.code == 2
    assert found.text.startswith("Megatron-Core refuses this command line (megatron/core/utils.py:")
    assert found.text.endswith("): 3 is not divisible by 2")
    assert failures.explain(refusal, ARGS, is_training=True) is None


def test_a_defect_keeps_its_traceback() -> None:
    """Nobody raised it on purpose, or it is of neither package."""
    assert failures.explain(caught(divide, "three", 2), ARGS, is_training=False) is None
    assert failures.explain(caught(int, "three"), ARGS, is_training=False) is None
    assert failures.explain(ValueError("never raised"), ARGS, is_training=False) is None


def test_a_refusal_of_this_package_keeps_its_words() -> None:
    refusal = caught(EchoTransformerConfig, num_layers=1, hidden_size=8, num_attention_heads=1,
                     moe_enable_echo=True)  # fmt: skip
    assert failures.explain_refusal(refusal) == str(refusal)


@pytest.mark.parametrize("name", ["total number of iterations", "learning rate"])
def test_another_schedule_than_in_the_checkpoint(name: str) -> None:
    values = "class input value 64 and checkpointvalue 16"
    text = f"OptimizerParamScheduler: {values} for {name} do not match"
    found = failures.explain(AssertionError(text), ARGS, is_training=False)
    assert found is not None
    assert f"--load somewhere: the {name} is 16 there and 64 here. Add --override" in found.text
    assert failures.explain(RuntimeError(text), ARGS, is_training=False) is None


def test_a_loss_that_is_no_number() -> None:
    def save_checkpoint() -> None:
        raise TypeError("expected str, bytes or os.PathLike object, not NoneType")

    error = caught(save_checkpoint)
    found = failures.explain(error, ARGS, is_training=True)
    assert found is not None
    assert found.code == 1
    assert found.text.startswith("The loss is NaN or infinite")
    with_save = Namespace(**{**vars(ARGS), "save": "there"})
    assert failures.explain(error, with_save, is_training=True) is None


def test_what_all_ranks_find_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for rank, said in (("0", "x.py: error: 3 is no size. Use 2.\n"), ("1", "")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stop, failures.one_sentence():
            raise ValueError("3 is no size. Use 2.")
        assert stop.value.code == 2
        assert capsys.readouterr().err.endswith(said.removeprefix("x.py"))
    with pytest.raises(TypeError), failures.one_sentence():
        raise TypeError("a defect")


LONELY = Path(__file__).with_name("lonely_failure.py")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["known", "unknown"])
def test_a_rank_that_fails_alone_ends_all(rank: int, kind: str) -> None:
    """The others wait in a collective for it; nobody had to kill them."""
    result = launch.run([rank, kind], 3, script=LONELY, timeout=60)
    if kind == "known":
        assert result.codes == (2, 2, 2), result.output
        errors = [line for line in result.output.splitlines() if ": error: " in line]
        assert len(errors) == 1
        assert errors[0].endswith("3 is not divisible by 2")
        assert "Traceback" not in result.output
    else:
        assert result.codes == (1, 1, 1), result.output
        assert result.output.count("ZeroDivisionError") == 1


def test_training_is_not_watched() -> None:
    """A rank that ends before the others ends is no failure once the first step has begun."""
    launch.run([0, "late"], 2, script=LONELY, timeout=60).check()
