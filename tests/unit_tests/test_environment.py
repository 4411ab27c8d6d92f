import pytest

from megatron_echo import environment


def names(has_cuda: bool, *argv: str) -> set[str]:
    return {flag[0] for flag in environment.flags_to_add(argv, has_cuda)}


def set_packages(monkeypatch: pytest.MonkeyPatch, te: bool, apex: bool, kernels: bool) -> None:
    monkeypatch.setattr(environment, "HAVE_TRANSFORMER_ENGINE", te)
    monkeypatch.setattr(environment, "HAVE_APEX", apex)
    monkeypatch.setattr(environment, "HAVE_MASKED_SOFTMAX_KERNEL", kernels)
    monkeypatch.setattr(environment, "HAVE_WGRAD_FUSION", kernels)


def test_a_gpu_with_everything_needs_only_the_evaluation_interval(monkeypatch) -> None:
    set_packages(monkeypatch, te=True, apex=True, kernels=True)
    assert names(True) == {"--eval-interval"}


def test_a_gpu_with_torch_alone_uses_local_layers_and_nccl(monkeypatch) -> None:
    set_packages(monkeypatch, te=False, apex=False, kernels=False)
    assert names(True) == {
        "--eval-interval",
        "--transformer-impl",
        "--no-rope-fusion",
        "--no-persist-layer-norm",
        "--no-masked-softmax-fusion",
        "--no-gradient-accumulation-fusion",
    }


def test_transformer_engine_without_apex_keeps_its_layers(monkeypatch) -> None:
    set_packages(monkeypatch, te=True, apex=False, kernels=False)
    assert names(True) == {"--eval-interval", "--no-gradient-accumulation-fusion"}


def test_only_unset_flags_are_added(capsys: pytest.CaptureFixture) -> None:
    given = ["--transformer-impl=local", "--eval-interval", "7"]
    flags = environment.add_missing_flags(given, has_cuda=False)
    assert flags[:3] == given
    assert flags.count("--eval-interval") == 1
    assert not any(word == "--transformer-impl" for word in flags)
    assert flags[flags.index("--distributed-backend") + 1] == "gloo"
    assert "--distributed-backend gloo" in capsys.readouterr().out


def test_a_flag_that_was_given_is_not_touched() -> None:
    assert environment.is_flag_given("--lr", ["--lr=1"])
    assert not environment.is_flag_given("--lr", ["--lr-decay-style", "cosine"])
    assert "--distributed-backend" not in names(False, "--distributed-backend", "nccl")


def test_megatron_fsdp_scales_gradients_itself_on_gloo() -> None:
    flag = "--no-gradient-reduce-div-fusion"
    assert flag in names(False, "--use-megatron-fsdp")
    assert flag not in names(False) | names(True, "--use-megatron-fsdp")


def test_versions_name_what_decides_a_result() -> None:
    versions = environment.versions()
    assert versions["megatron-core"] == "0.19.2"
    assert versions["torch"].startswith("2.11")
    assert environment.device_name()
