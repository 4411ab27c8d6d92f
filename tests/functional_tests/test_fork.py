"""The diff of ``docs/megatron_fork.md``, in a script that knows nothing of this package."""

import re
import subprocess
from pathlib import Path

import launch
from golden import read_tensorboard

from megatron_echo import environment

STOCK_SCRIPT = Path(__file__).resolve().parent / "stock_pretrain.py"
PAGE = launch.ROOT / "docs" / "megatron_fork.md"


def patched(folder: Path, script: str) -> Path:
    """A script with the page's diff applied as a user does it."""
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = folder / "pretrain_gpt.py"
    path.write_text(script)
    subprocess.run(["patch", "-p1"], input=diff, text=True, cwd=folder, check=True)
    return path


def test_the_diff_finds_its_lines_in_other_versions(tmp_path: Path) -> None:
    """More imports before them, and a configuration that depends on ModelOpt."""
    line = "    model_cfg = gpt_config_from_args(args)\n"
    choice = f"    if has_nvidia_modelopt:\n        model_cfg = None\n    else:\n    {line}"
    stock = STOCK_SCRIPT.read_text()
    assert line in stock
    script = patched(tmp_path, "import os\n" * 50 + stock.replace(line, choice)).read_text()
    compile(script, "pretrain_gpt.py", "exec")
    assert script.index(choice) < script.index("EchoGPTModelConfig)\n    full_config = ")


def test_four_lines_train_with_our_layer(tmp_path: Path) -> None:
    """MLA, where Megatron replaces the configuration class, and MTP; the same losses as ours."""
    script = patched(tmp_path, STOCK_SCRIPT.read_text())
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
