"""The machines: how many GPUs, how fast they compute and talk, and what is assumed of them."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cluster:
    """A cluster of equal nodes; rates are of one GPU and one direction.

    Attributes:
        name: for people.
        gpus: of the whole cluster.
        gpus_per_node: GPUs that NVLink (or its like) joins.
        nvlink_gb_s: 10^9 bytes a second between GPUs of a node.
        network_gb_s: 10^9 bytes a second to other nodes, this GPU's part of the network.
        hbm_gib: memory of a GPU that programs can use, GiB.
        tflops: peak of dense bf16 products, 10^12 a second.
        host_gb_s: 10^9 bytes a second between a GPU and the memory of its host.
    """

    name: str
    gpus: int
    gpus_per_node: int
    nvlink_gb_s: float
    network_gb_s: float
    hbm_gib: float
    tflops: float
    host_gb_s: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            kinds = (int,) if field.type is int else (int, float)
            good = isinstance(value, kinds) and not isinstance(value, bool)
            if not good or not 0 < value < math.inf:
                kind = "a positive whole number" if field.type is int else "a positive number"
                raise ValueError(
                    f"The cluster's {field.name} is {value!r}. Give {kind} ({_UNITS[field.name]})."
                )
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}. Use a multiple."
            )

    def ranks_per_node(self, ranks: int) -> int:
        """Of an expert-parallel group of consecutive ranks, how many share a node."""
        return math.gcd(ranks, self.gpus_per_node)


@dataclass(frozen=True)
class Assumptions:
    """Figures that nobody measured here; each is printed with the results.

    Attributes:
        efficiency: products' rate over the peak.
        link_efficiency: bandwidth reached over that of the data sheet.
        exchange_us: latency of one collective, microseconds.
        plan_us: planning of a layer call, microseconds.
        reserve_gib: context, NCCL and fragmentation.
        peer_margin: room in an all-to-all's parts, over the fullest that was seen.
        capacity_margin: room in the receive buffer, over the fullest rank that was seen.
    """

    efficiency: float = 0.5
    link_efficiency: float = 0.8
    exchange_us: float = 20.0
    plan_us: float = 100.0
    reserve_gib: float = 4.0
    peer_margin: float = 1.25
    capacity_margin: float = 1.05


_UNITS = {
    "gpus": "of the whole cluster",
    "gpus_per_node": "joined by NVLink",
    "nvlink_gb_s": "GB/s of one GPU, one direction",
    "network_gb_s": "GB/s of one GPU, one direction",
    "hbm_gib": "GiB that programs can use",
    "tflops": "dense bf16 peak, TFLOP/s",
    "host_gb_s": "GB/s between a GPU and its host, one direction",
}

CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster("h100-nvl8", 64, 8, 450, 50, 79, 989, 64),
        Cluster("h200-nvl8", 64, 8, 450, 50, 140, 989, 64),
        Cluster("h800-nvl8", 64, 8, 200, 50, 79, 989, 64),
        Cluster("b200-nvl8", 64, 8, 900, 50, 178, 2250, 64),
        Cluster("gb200-nvl72", 72, 72, 900, 50, 184, 2500, 225),
    )
}
"""From the vendors' data sheets: peak rates; one 400 Gbit/s network port for each GPU; PCIe 5.0 x16
to the host, or half of a Grace CPU's NVLink-C2C."""


def load_cluster(name: str, changes: dict[str, Any] | None = None) -> Cluster:
    """A cluster by name, or from a ``.json``, ``.yaml`` or ``.yml`` file with all fields.

    Args:
        name: one of :data:`CLUSTERS`, or a path. A file may leave its ``name`` out.
        changes: fields to set differently; those that are None stay.

    Raises:
        ValueError: an unknown name, a field missing or too many, a value out of range.
        FileNotFoundError: there is no such file.
    """
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    if name in CLUSTERS:
        return dataclasses.replace(CLUSTERS[name], **given)
    path = Path(name)
    if path.suffix not in (".json", ".yaml", ".yml"):
        raise ValueError(
            f"Cluster {name} is unknown. Use {', '.join(CLUSTERS)}, or a .json or .yaml file."
        )
    if not path.is_file():
        raise FileNotFoundError(f"There is no cluster file {name}. Give its path.")
    fields = {"name": path.stem, **_read(path), **given}
    names = [field.name for field in dataclasses.fields(Cluster)]
    missing = [each for each in names if each not in fields]
    if missing:
        what = "; ".join(f"{each}: {_UNITS[each]}" for each in missing)
        raise ValueError(f"{name} lacks {', '.join(missing)}. Add them ({what}).")
    unknown = [each for each in fields if each not in names]
    if unknown:
        raise ValueError(f"{name} has unknown fields {', '.join(unknown)}. Use {', '.join(names)}.")
    return Cluster(**fields)


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text()
    try:
        if path.suffix == ".json":
            fields = json.loads(text)
        else:
            fields = _read_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid {path.suffix[1:]} ({error}). Mend it.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is not one object with fields. Write {{gpus: 64, ...}}.")
    return fields


def _read_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(os.linesep.join(str(error).splitlines()[:1])) from error
