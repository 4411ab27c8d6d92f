"""The layer with cloned experts over two to four expert-parallel ranks, by its worker's checks."""

from pathlib import Path

import launch

WORKER = Path(__file__).resolve().parents[1] / "workers" / "clones.py"


def run(check: str, ranks: int, every: int = 1) -> None:
    print(launch.run([check], ranks, script=WORKER, env={"EVERY": str(every)}).check().output)


@launch.thinned_on_ranks(3, slow=(2, 4), every=5)
def test_dense(ranks: int, every: int) -> None:
    """Output and all gradients against a loop over experts and the layer without clones."""
    run("dense_fp64", ranks, every)


@launch.on_ranks(3)
def test_dense_in_fp32(ranks: int) -> None:
    run("dense_fp32", ranks)


@launch.on_ranks(3)
def test_dense_with_other_topk(ranks: int) -> None:
    run("dense_topk", ranks)


@launch.thinned_on_ranks(2, slow=(4,), every=3)
def test_probabilities_on_the_input(ranks: int, every: int) -> None:
    """With biases too; the layer that applies them elsewhere is seen."""
    run("probs_on_input", ranks, every)


@launch.thinned_on_ranks(4, slow=(2,), every=5)
def test_expert_tensor_parallelism(ranks: int, every: int) -> None:
    """Two ranks share each expert, over one or two expert-parallel ranks."""
    run("expert_tensor_parallelism", ranks, every)


@launch.thinned_on_ranks(2, slow=(4,), every=5)
def test_biases(ranks: int, every: int) -> None:
    """GPT-OSS's experts against a loop, with clones and without; broken biases are seen."""
    checks = ["biases", "biases_in_bf16", "mutants_of_biases"]
    launch.run(checks, ranks, script=WORKER, env={"EVERY": str(every)}).check()


@launch.on_ranks(2, slow=(4,))
def test_latent_experts(ranks: int) -> None:
    """Between the two projections of Megatron's latent MoE, with clones and without."""
    run("latent", ranks)


def test_clones_within_nodes() -> None:
    """Two nodes of two ranks: no clone and no byte of one leaves its node, and all is right."""
    checks = ["dense", "bytes", "mutants", "auto", "order"]
    launch.run(checks, 4, script=WORKER.with_name("nodes.py")).check()


@launch.on_ranks(3, slow=(2, 4))
def test_auto_tolerance(ranks: int) -> None:
    """Clones where they pay, else the bits of the layer without; and what the metrics say."""
    run("auto_tolerance", ranks)


@launch.on_ranks(3, slow=(2, 4))
def test_balance(ranks: int) -> None:
    """No rank computes more than the bound, the buffer is that size, and nothing is dropped."""
    run("balance", ranks)


@launch.on_ranks(2, slow=(3, 4))
def test_experts_without_clones_keep_their_bits(ranks: int) -> None:
    run("unmoved_experts", ranks)


@launch.on_ranks(3)
def test_one_pool_for_all_layers(ranks: int) -> None:
    """It may hold NaN between two uses, with microbatches in flight, and does not grow."""
    run("pool", ranks)


@launch.on_ranks(3)
def test_calls_in_flight(ranks: int) -> None:
    run("calls_in_flight", ranks)


@launch.on_ranks(2, slow=(3, 4))
def test_no_host_sync(ranks: int) -> None:
    run("no_host_sync", ranks)


@launch.on_ranks(3)
def test_gradient_hooks(ranks: int) -> None:
    """They fire once a backward pass, also when recomputed, with the whole gradient."""
    run("gradient_hooks", ranks)


@launch.on_ranks(2)
def test_data_parallel(ranks: int) -> None:
    """Megatron's DDP with overlap: the main gradient is whole when reported ready."""
    run("data_parallel", ranks)


@launch.thinned_on_ranks(3, every=5)
def test_nan_in_the_weights_of_one_expert(ranks: int, every: int) -> None:
    run("nan_weights", ranks, every)


@launch.on_ranks(3)
def test_nan_in_unused_slots(ranks: int) -> None:
    run("unused_slots", ranks)


@launch.thinned_on_ranks(3, every=5)
def test_same_bits(ranks: int, every: int) -> None:
    """Every run gives the same bits, also with NaN in all uninitialised memory."""
    run("same_bits", ranks, every)


@launch.on_ranks(3)
def test_bf16(ranks: int) -> None:
    """Gradients of the weights are as near to fp64 as without clones."""
    run("bf16", ranks)


@launch.thinned_on_ranks(3, every=5)
def test_evaluation(ranks: int, every: int) -> None:
    """Between training steps, without gradients, with other numbers of tokens."""
    run("evaluation", ranks, every)


def test_evaluation_drops_nothing() -> None:
    run("evaluation_drops_nothing", 3)


def test_training_after_inference() -> None:
    """The pool was made in inference mode."""
    run("inference_first", 2)


def test_one_rank() -> None:
    """A single rank makes no clones and allocates no pool."""
    run("one_rank", 1)


@launch.thinned_on_ranks(2, slow=(3,), every=2)
def test_flipping_router(ranks: int, every: int) -> None:
    """A recomputation with another routing plans again; no rank hangs."""
    run("flipping_router", ranks, every)


@launch.thinned_on_ranks(2, slow=(3,), every=5)
def test_peer_to_peer(ranks: int, every: int) -> None:
    """The same bits, one host copy a call, fewer bytes."""
    run("peer_to_peer", ranks, every)


def test_peer_to_peer_reads_the_host_once() -> None:
    """The detector sees that read, and no other."""
    run("peer_to_peer_reads_the_host_once", 2)


@launch.on_ranks(3)
def test_one_expert_each(ranks: int) -> None:
    run("one_expert_each", ranks)


@launch.on_ranks(3)
def test_exception_then_a_clean_step(ranks: int) -> None:
    run("exception_then_a_clean_step", ranks)


def test_state_dict() -> None:
    run("state_dict", 2)


@launch.on_ranks(3)
def test_self_check(ranks: int) -> None:
    """--moe-echo-check-every sees wrong weights in a slot, and ranks that plan differently."""
    run("self_check", ranks)


@launch.on_ranks(2, slow=(3,))
def test_experts_frozen_on_one_rank(ranks: int) -> None:
    """All weight transports; with an input that needs gradients, and without."""
    run("experts_frozen_on_one_rank", ranks)
