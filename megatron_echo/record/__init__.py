"""What a run writes: metrics, statistics, traces, routing, what modules keep."""
