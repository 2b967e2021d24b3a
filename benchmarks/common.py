"""What the benchmarks share: chats, timing, and a results file with the machine's name."""

import gc
import json
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

import trimtab as tt

RESULTS = Path(__file__).parent / "results"


def chats(count: int, seed: int = 0) -> list[tt.Example]:
    """Chats of about 30 to 200 tokens from the built-in sets: a prompt, an answer, some history.

    As in real sets of examples, each prompt comes with two answers.
    """
    rows = [e for name in tt.data.names() for e in tt.data.read(name)]
    by_prompt: dict[str, list[tt.Example]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    pairs = [pair for pair in by_prompt.values() if len(pair) >= 2]
    chosen = random.Random(seed)
    made: list[tt.Example] = []
    while len(made) < count:
        turns = []
        for _ in range(chosen.choice([0, 0, 0, 1, 2])):
            past = chosen.choice(rows)
            turns.append({"role": "user", "content": past.prompt})
            turns.append({"role": "assistant", "content": past.completion})
        for one in chosen.choice(pairs)[:2]:
            made.append(tt.Example(one.prompt, one.completion, one.label, tuple(turns)))
    return made[:count]


def best_of(
    variants: dict[str, Callable[[], Any]], repeats: int, *, warm_up: bool = True
) -> dict[str, float]:
    """Seconds of each variant: the best of ``repeats``, variants taking turns in a changing order.

    The best time is the one least disturbed by whatever else the machine does. ``warm_up``: a round
    before that does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(repeats + warm_up):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            start = time.perf_counter()
            variants[name]()
            if turn or not warm_up:
                times[name].append(time.perf_counter() - start)
    for name, taken in times.items():
        print(f"  {name:<42} best {min(taken):8.3f} s   median {statistics.median(taken):8.3f} s")
    return {name: min(taken) for name, taken in times.items()}


def peak_memory(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that a call adds to the process at its peak (resident set, sampled), and its result."""
    gc.collect()
    process, done = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = run()
    finally:
        done.set()
        watcher.join()
    return max(peak, process.memory_info().rss) - start, result


def peak_resident() -> int:
    """The most bytes that this process has had in memory so far.

    Linux hands the number of ``getrusage`` on from a parent to its child, this one it does not.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def check(name: str, value: float, limit: float, *, at_least: bool) -> dict[str, Any]:
    """One line of the report: a ratio beside its budget."""
    met = value >= limit if at_least else value <= limit
    sign = ">=" if at_least else "<="
    print(f"{'ok  ' if met else 'MISS'} {name}: {value:.3f} (budget {sign} {limit})", flush=True)
    return {"name": name, "value": round(value, 4), "budget": f"{sign} {limit}", "met": met}


def save(name: str, rows: list[dict[str, Any]]) -> None:
    """Write the results beside the benchmark, with the machine they were taken on."""
    RESULTS.mkdir(exist_ok=True)
    facts = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "trimtab": tt.__version__,
    }
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": facts, "results": rows}, indent=1) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {len(names) or '?'} cores"
