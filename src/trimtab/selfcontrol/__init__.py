"""SelfControl: steer a model by its own judgement of its answers (Cai et al. 2024, 2406.02721).

judge = tt.selfcontrol.Judge.named("happiness")
solution = tt.selfcontrol.solve(lm, "You lose your keys. How do you feel?", judge)
lm.generate(solution.prompt, edits=solution.edit)
"""

from trimtab.selfcontrol.analysis import (
    cosines,
    exact_match,
    final_number,
    heat_map,
    scores_by_iteration,
    trajectory,
    win_rate,
)
from trimtab.selfcontrol.files import (
    Target,
    pairs,
    read_prompts,
    read_records,
    read_targets,
    seed_prompts,
    solve_file,
    targets,
)
from trimtab.selfcontrol.judge import (
    Calibration,
    Judge,
    bootstrap_auroc,
    calibrate,
    names,
    score,
)
from trimtab.selfcontrol.search import Iteration, Options, Solution, Try, solve
from trimtab.selfcontrol.slopes import gradient, shaped

__all__ = [
    "Calibration",
    "Iteration",
    "Judge",
    "Options",
    "Solution",
    "Target",
    "Try",
    "bootstrap_auroc",
    "calibrate",
    "cosines",
    "exact_match",
    "final_number",
    "gradient",
    "heat_map",
    "names",
    "pairs",
    "read_prompts",
    "read_records",
    "read_targets",
    "score",
    "scores_by_iteration",
    "seed_prompts",
    "shaped",
    "solve",
    "solve_file",
    "targets",
    "trajectory",
    "win_rate",
]
