"""What else the machine did while a cell was measured: other processes, throttling, clocks, temperature.

A number from a busy or a hot machine is not wrong, but its reader must be told. Nothing here touches a clock.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from decodathlon.harness.results.environment import nvidia_smi

#: Other processes' share of the cores from which a cell is called contended.
CONTENDED = 0.1
#: Seconds between two looks at the GPU.
LOOK_EVERY = 5.0
#: NVML's clock event reasons that slow a GPU down against what it could do; idling and set clocks are not among them.
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
_GPU_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu", "memory.used")
#: Drivers before 535 call the same field by its older name.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


class Conditions:
    """Watches from `begin` to `end`. On a CPU it looks twice, on a GPU every few seconds."""

    def __init__(self) -> None:
        #: One line for each thing that a reader of the row should know.
        self.remarks: list[str] = []
        self._device: Any = None
        self._begun = False
        self._found: dict[str, Any] = {}

    def begin(self, device: Any) -> None:
        """
        Args:
            device: the torch device that computes; None for work that needs no torch.
        """
        self._device = device
        self._begun = True
        self._found = {"load_before": _load(), "switches": switches(), "pid": os.getpid()}
        self._threads = set(threading.enumerate())
        self._at, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()
        self._looks: list[dict[str, Any]] = []
        self._done = threading.Event()
        if getattr(device, "type", "cpu") == "cuda":
            from decodathlon.harness.measure.identity import gpu_uuid  # needs torch, which a GPU's process has

            self._watcher = threading.Thread(target=self._watch, args=(gpu_uuid(device),), daemon=True)
            self._watcher.start()

    def _watch(self, uuid: str | None) -> None:
        while True:
            look = gpu_look(uuid)
            if look:
                self._looks.append(look)
            if self._done.wait(LOOK_EVERY):
                return

    def end(self) -> dict[str, Any]:
        """What was seen, for the record; empty where `begin` was not reached."""
        if not self._begun:
            return {}
        self._done.set()
        found = self._found | {"load_after": _load()}
        left = _left_behind(found["switches"], self._threads)
        if left and self._device is not None:
            found["left_behind"] = left
            self.remarks.append(f"left behind in its process, which was replaced: {', '.join(left)}")
        wall = max(time.monotonic() - self._at, 1e-9)
        busy = _busy_seconds()
        if busy is not None and self._busy is not None:
            others = max(0.0, (busy - self._busy) - (_own_seconds() - self._own))
            share = others / wall / (os.cpu_count() or 1)
            found["others_share_of_cores"] = round(share, 4)
            if share > CONTENDED and getattr(self._device, "type", "cpu") != "server":  # which computes elsewhere
                self.remarks.append(f"contended: other processes used {share:.0%} of the cores")
        if getattr(self._device, "type", "cpu") == "cuda":
            self._watcher.join(timeout=30)
            found["gpu"] = self._looks
            self.remarks += gpu_remarks(self._looks, os.getpid())
        return found


def _left_behind(before: dict[str, Any], threads: set[threading.Thread]) -> list[str]:
    """What a cell did to its process that would reach into the next cell's measurement."""
    changed = [name for name, value in switches().items() if name in before and value != before[name]]
    if any(t not in threads for t in threading.enumerate()):
        changed.append("threads")
    try:
        os.fstat(2)
    except OSError:
        changed.append("stderr")
    return changed


def gpu_look(uuid: str | None) -> dict[str, Any]:
    """Clocks, temperature, power, throttle reasons and processes of one GPU; empty where nvidia-smi does not tell."""
    which = ["-i", uuid] if uuid else []
    for reasons in _REASONS:
        values = nvidia_smi(*which, f"--query-gpu={','.join([*_GPU_FIELDS, reasons])}")
        if values:
            look: dict[str, Any] = dict(zip([*_GPU_FIELDS, "reasons"], values[0], strict=False))
            pids = [row[0] for row in nvidia_smi(*which, "--query-compute-apps=pid")]
            look["pids"] = [int(p) for p in pids if p.isdigit()]
            return look
    return {}


def gpu_remarks(looks: list[dict[str, Any]], own: int) -> list[str]:
    """What of these looks a reader should know."""
    remarks, slowed, foreign = [], set(), set()
    for look in looks:
        try:
            bits = int(str(look.get("reasons", "0")), 16)
        except ValueError:
            bits = 0
        slowed |= {name for bit, name in THROTTLES.items() if bits & bit}
        foreign |= {pid for pid in look.get("pids", []) if pid != own}
    if slowed:
        remarks.append(f"throttled: {', '.join(sorted(slowed))}")
    if foreign:
        remarks.append(f"contended: {len(foreign)} other processes on the GPU")
    return remarks


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _busy_seconds() -> float | None:
    """CPU time that all processes of the machine have used (Linux): user, nice, system, irq, softirq, steal."""
    try:
        values = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    return float(sum(values[i] for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK"))


def _own_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def switches() -> dict[str, Any]:
    """Settings that change speed or rounding, for this cell and for every later one in the same process."""
    if "torch" not in sys.modules:  # the controller does without
        return {"gc": gc.isenabled()}
    import torch

    return {
        "torch_threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "grad": torch.is_grad_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "gc": gc.isenabled(),
    }
