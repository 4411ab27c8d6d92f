"""The five lines of ``docs/megatron_fork.md``, in a script that knows nothing of this package."""

import re
from pathlib import Path

import launch
from golden import read_tensorboard

from megatron_echo import environment

STOCK_SCRIPT = Path(__file__).resolve().parent / "stock_pretrain.py"
PAGE = launch.ROOT / "docs" / "megatron_fork.md"


def patched(script: str, diff: str) -> str:
    """A script with a diff applied; the lines before a change say where it belongs."""
    for hunk in re.split(r"^@@.*@@\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines()
        old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        assert script.count(old) == 1, f"this is not in the script once:\n{old}"
        script = script.replace(old, new)
    return script


def test_five_lines_train_with_our_layer(tmp_path: Path) -> None:
    """MLA, where Megatron replaces the configuration class, and MTP; the same losses as ours."""
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(re.findall(r"^\+(?!\+\+)", diff, re.MULTILINE)) == 5
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(patched(STOCK_SCRIPT.read_text(), diff))
    flags = {
        "expert_model_parallel_size": 2, "train_iters": 2, "mtp_num_layers": 1,
        "multi_latent_attention": True, "q_lora_rank": 32, "kv_lora_rank": 24,
        "qk_head_dim": 16, "qk_pos_emb_head_dim": 8, "v_head_dim": 16,
        "moe_enable_echo": True, "moe_num_echo_experts": 4, "moe_echo_force_skew": 1.0,
        "moe_echo_trace_dir": tmp_path / "traces",
    }  # fmt: skip
    missing = [word for flag in environment.flags_to_add([], has_cuda=False) for word in flag]
    words = launch.tiny_model(**flags, tensorboard_dir=tmp_path / "fork")
    launch.run([*words, *missing], 2, script=script).check()
    assert len(list((tmp_path / "traces").glob("*.npz"))) == 2
    launch.run(launch.tiny_model(**flags, tensorboard_dir=tmp_path / "ours"), 2).check()
    metrics = ("lm loss", "mtp_1 loss", "moe_echo/clones")
    curves = read_tensorboard(tmp_path / "fork", metrics)
    assert curves == read_tensorboard(tmp_path / "ours", metrics)
    assert curves["moe_echo/clones"][1] > 0
