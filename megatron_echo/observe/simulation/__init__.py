"""The parts of ``python -m megatron_echo.observe.simulate``: what a run would cost, on paper."""
