"""A receive buffer that is too small: all ranks stop alike and nothing is lost, or pairs go."""

from pathlib import Path

import launch
import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_echo.record.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("single_rank")  # Megatron's checkpoint reader wants a group
ECHO = {"moe_enable_echo": True, "moe_num_echo_experts": 0}
SHOW_WEIGHTS = """
import pretrain_gpt_moe
import torch
from megatron.training import training
from megatron_echo.dispatch import MoEOverflowError

step = training.train_step

def digest(model, optimizer):
    names = ("exp_avg", "exp_avg_sq")
    tensors = list(model[0].parameters())
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in each.optimizer.state.values():
            tensors += [state[name] for name in names if name in state]
    return sum(float(t.double().abs().sum()) for t in tensors)

def watched(forward_step, iterator, model, optimizer, *args, **kwargs):
    before = digest(model, optimizer)
    try:
        return step(forward_step, iterator, model, optimizer, *args, **kwargs)
    except MoEOverflowError:
        print(f"UNTOUCHED={digest(model, optimizer) == before}\\n", end="", flush=True)
        torch.distributed.barrier()  # the first process that ends takes the others with it
        raise

if __name__ == "__main__":
    training.train_step = watched
    pretrain_gpt_moe.main()
"""


OTHER_FINALIZE = """
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import get_model_config

build = training.setup_model_and_optimizer

def with_another_function(*args, **kwargs):
    built = build(*args, **kwargs)
    for chunk in built[0]:
        get_model_config(chunk).finalize_model_grads_func = finalize_model_grads
    return built

training.setup_model_and_optimizer = with_another_function
"""


def overflow_messages(output: str) -> list[str]:
    return [line for line in output.splitlines() if "MoEOverflowError: " in line]


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [
        ({"expert_model_parallel_size": 2}, 2),
        pytest.param({"pipeline_model_parallel_size": 2}, 2, marks=pytest.mark.slow),
        pytest.param({"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 4,
                     marks=pytest.mark.slow),
    ],
    ids=["ep2", "pp2", "ep2_pp2"],
)  # fmt: skip
def test_every_rank_stops_before_the_optimizer(layout: dict, ranks: int, tmp_path: Path) -> None:
    """The step that overflows changes no weight; every rank says the same, and what suffices."""
    script = tmp_path / "watched.py"
    script.write_text(SHOW_WEIGHTS)
    flags = {**ECHO, **layout, "moe_received_token_capacity": 0.9}
    result = launch.run(launch.tiny_model(**flags), ranks, script=script)
    assert all(result.codes)
    assert result.output.count("UNTOUCHED=True") == ranks
    messages = overflow_messages(result.output)
    assert len(set(messages)) == 1
    words = messages[0].split("--moe-received-token-capacity ")[1].split()[0]
    assert 1.0 <= float(words) < 1.5
    flags |= {"moe_received_token_capacity": 1.5, "run_dir": tmp_path / "run"}
    launch.run(launch.tiny_model(**flags), ranks).check()


def test_a_script_that_replaces_our_function_is_stopped_as_well(tmp_path: Path) -> None:
    """``config.finalize_model_grads_func`` set after the model was built: still no step is lost."""
    script = tmp_path / "watched.py"
    before, main = SHOW_WEIGHTS.split("if __name__")
    script.write_text(f"{before}{OTHER_FINALIZE}\nif __name__{main}")
    flags = {**ECHO, "expert_model_parallel_size": 2, "moe_received_token_capacity": 0.9}
    result = launch.run(launch.tiny_model(**flags), 2, script=script)
    assert all(result.codes)
    assert result.output.count("UNTOUCHED=True") == 2
    assert len(set(overflow_messages(result.output))) == 1


def test_a_failed_step_leaves_the_last_checkpoint(tmp_path: Path, text_flags: dict) -> None:
    """Saved at step 2, overflow at step 3: the run ends, and goes on from there with capacity."""
    flags = {**text_flags, **ECHO, "expert_model_parallel_size": 2, "train_iters": 4,
             "save_interval": 2, "save": tmp_path / "ckpt"}  # fmt: skip
    launch.run(launch.tiny_model(**flags, exit_interval=2), 2).check()
    small = {**flags, "load": tmp_path / "ckpt", "moe_received_token_capacity": 0.6}
    result = launch.run(launch.tiny_model(**small), 2)
    assert all(result.codes)
    assert len(set(overflow_messages(result.output))) == 1
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "2"
    again = {**flags, "load": tmp_path / "ckpt", "run_dir": tmp_path / "run"}
    launch.run(launch.tiny_model(**again), 2).check()
    assert [line["iteration"] for line in read_metrics(tmp_path / "run")] == [3, 4]
    content = dist_checkpointing.load_plain_tensors(str(tmp_path / "ckpt" / "iter_0000004"))
    assert all(torch.isfinite(v).all() for v in content.values() if torch.is_tensor(v))


def test_dropping_is_counted_and_logged(tmp_path: Path) -> None:
    flags = {**ECHO, "expert_model_parallel_size": 2, "moe_received_token_capacity": 0.8,
             "moe_echo_overflow": "drop", "run_dir": tmp_path}  # fmt: skip
    result = launch.run(launch.tiny_model(**flags), 2).check()
    warnings = [line for line in result.output.splitlines() if "pairs dropped in this step" in line]
    assert len(warnings) == 4  # one a step, from the first rank only
    assert "--moe-received-token-capacity" in warnings[0]
    assert all(line["lm loss"] < 5 for line in read_metrics(tmp_path))


def test_a_crowded_peer_is_an_overflow_too(tmp_path: Path) -> None:
    flags = {**ECHO, "expert_model_parallel_size": 2, "moe_echo_token_transport": "all_to_all",
             "moe_echo_peer_capacity": 0.5}  # fmt: skip
    result = launch.run(launch.tiny_model(**flags), 2)
    messages = overflow_messages(result.output)
    assert "--moe-echo-peer-capacity" in messages[0]
    flags |= {"moe_echo_peer_capacity": 1.0, "run_dir": tmp_path}
    launch.run(launch.tiny_model(**flags), 2).check()
