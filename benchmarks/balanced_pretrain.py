"""``pretrain_gpt_moe.py`` with a router that gives each expert the same number of tokens.

For benchmarks only: the tokens go round the experts, whatever the router says, so that a receive
capacity of 1.0 suffices. The router's own work is still done.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import pretrain_gpt_moe  # noqa: E402  (turns the CPU backend on: before Megatron)

# isort: split
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from moe_layer import forced_routing  # noqa: E402

if __name__ == "__main__":
    TopKRouter.routing = forced_routing(TopKRouter.routing)
    pretrain_gpt_moe.main()
