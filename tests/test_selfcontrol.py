"""SelfControl by laws and against independent computations: judges, gradients, the search.

Nothing here calls Trimtab to check Trimtab: scores are read off full logits, gradients come from
hooks and retain_grad, answers from decoding without a cache.
"""

import math
from pathlib import Path

import pytest
import torch

import model_zoo
import tokenizers_zoo as zoo
import trimtab as tt
from trimtab.errors import ChatError, PlaceError
from trimtab.selfcontrol import Judge, calibrate, gradient, solve
from trimtab.selfcontrol.slopes import shaped

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "selfcontrol"
JUDGE = Judge("Happy?")
PROMPTS = ["Hello there, who are you?", "Hi", "What is this?"]
ANSWERS = ["I am a ship", [40, 41, 42], ""]
FAMILIES = ["llama", "gpt2", "bloom", "gemma2"]


def lm_of(name="llama", template="chatml", spaced=False):
    tokenizer = (zoo.spaced_tokenizer if spaced else zoo.byte_tokenizer)(template)
    return tt.LM(model_zoo.tiny(name), tokenizer)


def real_rows(lm, prompts, answers):
    batch = lm.batch(prompts, answers)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    return rows, batch.prompt_len.tolist()


def by_hand(lm, row, judge, tail, extra=None, after=None):
    """The score of one row with a graph, and the block outputs [T, D] that it hangs on.

    ``extra`` [L, N, D] is added to the first N tokens of every block's output.
    """
    kept = []

    def hook(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        if extra is not None:
            added = torch.zeros_like(x)
            added[0, : extra.shape[1]] = extra[len(kept)]
            x = x + added
        x.retain_grad()
        kept.append(x)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handles = [block.register_forward_hook(hook) for block in lm.anatomy.blocks]
    try:
        logits = lm.model(torch.tensor([row + tail.ids])).logits[0, -1].float()
    finally:
        for handle in handles:
            handle.remove()
    score = torch.sigmoid((logits[tail.target] - logits[tail.other]) / judge.temperature)
    return score, logits, kept


# ---- judges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("template", [*zoo.TEMPLATES])
def test_the_tail_is_what_the_template_writes_between_two_answers(template, spaced):
    tokenizer = (zoo.spaced_tokenizer if spaced else zoo.byte_tokenizer)(template)
    lm = tt.LM(model_zoo.tiny("llama"), tokenizer)
    turns = [("user", "Hi"), ("assistant", "A ship."), ("user", "Happy?"), ("assistant", "Yes")]
    messages = [{"role": r, "content": c} for r, c in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    between = text[text.index("A ship.") + len("A ship.") : text.rindex("Yes")]
    tail = JUDGE.tail(lm)
    plain = tokenizer(between, add_special_tokens=False)["input_ids"]
    told, wanted = (tokenizer.decode(ids) for ids in (tail.ids, plain))
    assert told.strip() == wanted.strip() and "Happy?" in told
    words = [tokenizer.decode([i]).strip() for i in (tail.target, tail.other)]
    assert "Yes".startswith(words[0]) and "No".startswith(words[1]) and all(words)


def test_a_model_without_a_template_is_asked_in_plain_text():
    lm = lm_of(template=None)
    tail = JUDGE.tail(lm)
    assert lm.tokenizer.decode(tail.ids) == "\n\nQuestion: Happy?\nAnswer:"
    assert lm.tokenizer.decode([tail.other]) == " No"


def test_words_that_begin_alike_are_refused_with_a_remedy():
    lm = lm_of()
    with pytest.raises(ChatError, match=r"both begin with the token 'I'.*choose words"):
        Judge("How are you?", yes="I am happy", no="I am sad").check(lm)
    JUDGE.check(lm)  # and others are not
    with pytest.raises(ChatError, match="both begin"):
        solve(lm, "Hi", Judge("How are you?", yes="I am happy", no="I am sad"))


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"question": " "}, "asks a question"),
        ({"target": "maybe"}, "one of 'Yes', 'No', 'yes', 'no', not 'maybe'"),
        ({"direction": 0}, "1 or -1, not 0"),
        ({"temperature": 0.0}, "temperature is a number above 0"),
        ({"weight": math.nan}, "weight is a number above 0"),
    ],
)
def test_a_judge_says_what_is_wrong_with_it(changes, told):
    with pytest.raises(ChatError, match=told):
        Judge(**{"question": "Happy?"} | changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_score_is_read_at_the_last_position_of_the_exact_ids(name):
    lm = lm_of(name)
    rows, _ = real_rows(lm, PROMPTS, ANSWERS)
    tail = JUDGE.tail(lm)
    wanted = torch.stack([by_hand(lm, row, JUDGE, tail)[0] for row in rows]).detach()
    found = JUDGE.score(lm, PROMPTS, ANSWERS)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    shifted = torch.stack([by_hand(lm, row[:-1], JUDGE, tail)[0] for row in rows]).detach()
    assert (found - shifted).abs().max() > 1e-4  # one token less is another row


def test_directions_targets_and_weights():
    lm = lm_of()
    plain = JUDGE.score(lm, PROMPTS, ANSWERS)
    for other in (Judge("Happy?", target="no"), JUDGE.away()):
        torch.testing.assert_close(other.score(lm, PROMPTS, ANSWERS), 1 - plain)
    torch.testing.assert_close(JUDGE.away().away().score(lm, PROMPTS, ANSWERS), plain)
    second = Judge("Is this a ship?", weight=3.0)
    both = tt.selfcontrol.score(lm, [JUDGE, second], PROMPTS, ANSWERS)
    torch.testing.assert_close(both, (plain + 3 * second.score(lm, PROMPTS, ANSWERS)) / 4)
    assert (both - plain).abs().max() > 1e-3


def test_a_target_may_be_the_word_itself():
    assert Judge("How do you feel?", yes="Happy", no="Sad", target="Sad").target == "no"
    assert Judge("Happy?", target="Yes") == Judge("Happy?", target="yes")


def test_every_built_in_judge_can_be_asked():
    lm = lm_of()
    assert len(tt.selfcontrol.names()) >= 10 + 9
    for name in tt.selfcontrol.names():
        judge = Judge.named(name)
        if judge.yes[0] != judge.no[0]:  # this tokenizer knows hardly more than letters
            judge.check(lm)
        assert judge.question.count("?") == 1 and len(judge.question) < 60
    assert Judge.named("sadness") == Judge.named("happiness", target="no")
    with pytest.raises(ChatError, match="no built-in judge 'hapiness'; there are"):
        Judge.named("hapiness")


def test_swapping_names_the_words_in_the_other_order():
    judge = Judge("Are you happy? Answer Yes or No.")
    assert judge.swapped() == Judge("Are you happy? Answer No or Yes.")
    assert JUDGE.swapped().question == "Happy? No or Yes?"
    assert Judge("Was it No or Yes?").swapped().question == "Was it Yes or No?"


def test_calibration_is_the_area_under_the_curve_of_the_scores():
    lm = lm_of()
    texts = ["a ship", "fox", "dog", "the road", "rain", "sea", "bright", "train"]
    prompts, labels = ["Hi"] * 8, [1, 0, 1, 0, 0, 1, 1, 0]
    found = calibrate(lm, JUDGE, prompts, texts, labels, resamples=100)
    scores = JUDGE.score(lm, prompts, texts)
    both = list(zip(scores, labels, strict=True))
    won = [float(a > b) for a, x in both for b, y in both if x > y]
    assert found.auroc == pytest.approx(sum(won) / len(won))
    assert found.interval[0] <= found.auroc <= found.interval[1]
    nothing = torch.stack([JUDGE.score(lm, ["Hi"], [a])[0] for a in ("", "N/A")]).mean()
    assert found.content_free == pytest.approx(float(nothing), abs=1e-5)
    best = (scores > scores.median()).int().tolist()
    perfect = calibrate(lm, JUDGE, prompts, texts, best, resamples=100)
    assert perfect.auroc == 1.0 and found.auroc != 1.0
    with pytest.raises(ChatError, match="a label for each of 8 answers"):
        calibrate(lm, JUDGE, prompts, texts, [1] * 8)
    graded = calibrate(lm, JUDGE, prompts, texts, [0.4 + 0.2 * x for x in labels], resamples=100)
    assert graded.auroc == found.auroc  # the rule of every label: above a half
    assert graded.auroc == pytest.approx(
        tt.evals.agreement(lambda p, a: scores, prompts, texts, [0.4 + 0.2 * x for x in labels])
    )


# ---- the gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["score", "cross_entropy"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_autograds_at_every_block_output(name, objective):
    lm = lm_of(name)
    rows, prompt_len = real_rows(lm, PROMPTS, ANSWERS)
    tail, smoothing = JUDGE.tail(lm), 0.1 if objective == "cross_entropy" else 0.0
    found = gradient(
        lm, PROMPTS, ANSWERS, JUDGE, objective=objective, label_smoothing=smoothing, batch_size=2
    )
    assert found.shape == (lm.n_layers, 3, max(prompt_len), lm.width)
    wholes = []
    for i, (row, n) in enumerate(zip(rows, prompt_len, strict=True)):
        score, logits, kept = by_hand(lm, row, JUDGE, tail)
        target = torch.tensor([tail.target])
        entropy = torch.nn.functional.cross_entropy(logits[None], target, label_smoothing=smoothing)
        (-score if objective == "score" else entropy).backward()
        lm.model.zero_grad(set_to_none=True)
        whole = torch.stack([x.grad[0] for x in kept])
        wholes.append(whole)
        wanted = whole[:, :n]
        assert (found[:, i, :n] - wanted).norm() <= 1e-4 * wanted.norm()
        assert whole[-1, -1].norm() > 0 == wanted[-1].norm() < wanted[-2].norm()  # no way on
        assert found[:, i, n:].abs().max() == 0 if n < found.shape[2] else True
    off = wholes[0][:, 1 : 1 + prompt_len[0]]  # one token off is something else
    assert (found[:, 0, : prompt_len[0]] - off).norm() > 0.1 * off.norm()


def test_the_gradient_under_an_edit_is_that_of_the_edited_run():
    lm = lm_of()
    rows, (n, *_) = real_rows(lm, PROMPTS[:1], ANSWERS[:1])
    tail = JUDGE.tail(lm)
    extra = torch.randn(lm.n_layers, n, lm.width, generator=torch.Generator().manual_seed(0))
    edit = tt.Add("resid@all prompt", extra[:, None])
    score, _, kept = by_hand(lm, rows[0], JUDGE, tail, extra)
    (-score).backward()
    lm.model.zero_grad(set_to_none=True)
    wanted = torch.stack([x.grad[0, :n] for x in kept])
    for given in (edit, [edit]):
        found = gradient(lm, PROMPTS[:1], ANSWERS[:1], JUDGE, edits=given)[:, 0]
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    plain = gradient(lm, PROMPTS[:1], ANSWERS[:1], JUDGE)[:, 0]
    assert (plain - wanted).norm() > 0.1 * wanted.norm()


def test_a_batch_is_its_rows_and_several_judges_are_their_mean():
    lm = lm_of()
    edits = [None, tt.Add("resid@1 prompt", torch.ones(1, lm.width)), None]
    whole = gradient(lm, PROMPTS, ANSWERS, JUDGE, edits=edits)
    for i in range(3):
        alone = gradient(lm, [PROMPTS[i]], [ANSWERS[i]], JUDGE, edits=edits[i])
        n = alone.shape[2]
        torch.testing.assert_close(whole[:, i, :n], alone[:, 0], rtol=1e-4, atol=1e-7)
    second = Judge("Is this a ship?", weight=3.0)
    both = gradient(lm, PROMPTS, ANSWERS, [JUDGE, second], edits=edits)
    other = gradient(lm, PROMPTS, ANSWERS, second, edits=edits)
    torch.testing.assert_close(both, (whole + 3 * other) / 4, rtol=1e-4, atol=1e-7)


def test_the_gradient_leaves_the_model_as_it_was():
    lm = lm_of()
    with torch.no_grad():
        gradient(lm, PROMPTS, ANSWERS, JUDGE)
    assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())
    assert lm.taps.call is None


def test_places_lie_within_the_prompt():
    lm = lm_of()
    whole = gradient(lm, PROMPTS, ANSWERS, JUDGE)
    same = gradient(lm, PROMPTS, ANSWERS, JUDGE, "resid@all all")
    torch.testing.assert_close(same, whole)
    last = gradient(lm, PROMPTS, ANSWERS, JUDGE, "resid@1,3 prompt[-1:]")
    lengths = lm.batch(PROMPTS).prompt_len.tolist()
    for i, n in enumerate(lengths):
        torch.testing.assert_close(last[:, i, 0], whole[[1, 3], i, n - 1], rtol=1e-4, atol=1e-7)
    few = gradient(lm, PROMPTS, ANSWERS, JUDGE, "resid@2 [[0, 4], [1], [2, 3]]")
    torch.testing.assert_close(few[0, 0], whole[2, 0, [0, 4]], rtol=1e-4, atol=1e-7)
    assert few[0, 1, 1].abs().max() == 0
    with pytest.raises(PlaceError, match="the answer, which stays free"):
        gradient(lm, PROMPTS, ANSWERS, JUDGE, "resid@1 answer")
    with pytest.raises(PlaceError, match="names no token of a prompt"):
        gradient(lm, PROMPTS, ANSWERS, JUDGE, "resid@1 [500]")


def test_clip_means_clip_and_top_k_keeps_the_largest():
    g = torch.randn(3, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    g[0, 0, 0] *= 0.01
    norm = g.norm(dim=-1)
    clipped = shaped(g, clip=2.5).norm(dim=-1)
    torch.testing.assert_close(clipped, norm.clamp_max(2.5))
    assert (norm > 2.5).any() and (norm < 1).any()  # both sides are there
    torch.testing.assert_close(shaped(g, clip=2.5)[0, 0, 0], g[0, 0, 0])
    kept = shaped(g, top_k=4)
    for row in range(2):
        wanted = norm[:, row].flatten().topk(4).values.sort().values
        found = kept[:, row].norm(dim=-1).flatten()
        torch.testing.assert_close(found[found > 0].sort().values, wanted)


@pytest.mark.slow
def test_a_small_step_lowers_the_loss_of_twenty_prompts(smollm2):
    judge = Judge("How do you feel?", yes="Happy", no="Sad")
    examples = [e for e in tt.data.read("happiness") if e.label == 0][:20]
    prompts, answers = [e.prompt for e in examples], [e.completion for e in examples]
    tail = judge.tail(smollm2)
    whole = gradient(smollm2, prompts, answers, judge)
    random = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0))
    random = random / random.norm(dim=-1, keepdim=True) * whole.norm(dim=-1, keepdim=True)
    rows = smollm2.batch(
        prompts, [[*_ids(smollm2, p, a), *tail.ids] for p, a in zip(prompts, answers, strict=True)]
    )

    def score(direction, step):
        unit = direction / direction.flatten(2).norm(dim=-1).mean() if direction is not None else 0
        edit = None if direction is None else tt.Add("resid@all prompt", step * unit)
        with torch.no_grad():
            z = smollm2(rows, edits=edit).logits[:, -1]
        return (z[:, tail.target] - z[:, tail.other]).double()

    base = score(None, 0)
    assert (score(whole, -0.1) > base).all()
    assert (score(whole, +0.1) < base).all()
    moved = (score(random, -0.1) - base) / (score(whole, -0.1) - base)
    assert float((moved > 0.2).double().mean()) < 0.5


def _ids(lm, prompt, answer):
    rows, (n, *_) = real_rows(lm, [prompt], [answer])
    return rows[0][n:]


# ---- the search ----------------------------------------------------------------------------------

SMALL = dict(steps=2, search=3, step_size=4.0, max_new_tokens=6, max_perplexity_ratio=1e9)
LOOSE = SMALL | dict(max_repetition=1.0)


def greedy(lm, ids, n, edit=None):
    """Decoding without a cache; the edit stands at the prompt."""
    prompt, ends = list(ids), set(lm.end_ids)
    new = []
    for _ in range(n):
        whole = torch.tensor([prompt + new])
        batch = tt.Batch(whole, prompt_len=torch.tensor([len(prompt)]))
        with torch.no_grad():
            token = int(lm(batch, edits=edit).logits[0, -1].argmax())
        if token in ends:
            break
        new.append(token)
    return new


def log_loss(lm, row, n):
    with torch.no_grad():
        logits = lm.model(torch.tensor([row])).logits[0].double().log_softmax(-1)
    picked = [-float(logits[i - 1, row[i]]) for i in range(n, len(row))]
    return sum(picked) / len(picked)


def test_a_solution_is_what_its_edit_gives_and_is_scored_without_it():
    lm = lm_of("gpt2")
    solutions = solve(lm, PROMPTS, JUDGE, **LOOSE)
    for solution in solutions:
        ids = real_rows(lm, [solution.prompt], [""])[0][0]
        assert list(solution.answer_ids) == greedy(lm, ids, 6, solution.edit)
        score = by_hand(lm, ids + list(solution.answer_ids), JUDGE, JUDGE.tail(lm))[0].detach()
        assert solution.score == pytest.approx(float(score), abs=1e-5)
        loss = log_loss(lm, ids + list(solution.answer_ids), len(ids))
        assert solution.perplexity == pytest.approx(math.exp(loss), rel=1e-3)
        assert solution.edit.delta.shape == (lm.n_layers, 1, len(ids), lm.width)
    assert any(solution.gain > 0 for solution in solutions)


def test_the_trace_says_what_was_tried_and_only_better_answers_are_taken():
    lm = lm_of()
    solutions = solve(lm, PROMPTS, JUDGE, **LOOSE | {"steps": 3})
    for solution in solutions:
        best = solution.first.score
        for iteration in solution.trace[1:]:
            assert [one.step for one in iteration.tries] == [4.0, 8.0, 16.0]
            assert len(iteration.gradient_norms) == lm.n_layers
            taken = iteration.accepted
            better = [one.score for one in iteration.tries if one.score > best]
            assert (taken is None) == (not better)
            if taken is not None:
                assert taken.score == max(better)
                best = taken.score
        assert solution.score == best
        assert all(it.accepted for it in solution.trace[:-1])  # the first failure ends it
    assert {len(s.trace) for s in solutions} != {1}


@pytest.mark.parametrize("judges", [JUDGE, [JUDGE, Judge("Kind?", direction=-1, weight=2.0)]])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_pass_of_the_first_gradient_reads_the_first_answers(name, judges):
    lm, options = lm_of(name), {"search": 2, "max_new_tokens": 5}
    one_each = solve(lm, PROMPTS[:2], judges, steps=1, **options)
    read_apart = solve(lm, PROMPTS[:2], judges, steps=0, **options)
    for now, apart in zip(one_each, read_apart, strict=True):
        assert now.first.answer == apart.first.answer
        assert now.first.score == pytest.approx(apart.first.score, abs=1e-6)
        assert now.first.perplexity == pytest.approx(apart.first.perplexity, rel=1e-4)
    first, second = (one.first for one in one_each)
    assert first.score != pytest.approx(second.score, abs=1e-6)  # rows are not mixed up


def test_one_iteration_takes_the_fewest_passes():
    lm = lm_of()
    lm.model.generation_config.eos_token_id = lm.tokenizer.eos_token_id = None
    lm.text_config.eos_token_id = None  # every answer is as long as it may be
    lm.takes_trees()

    def passes(**options):
        seen = []
        handle = lm.anatomy.trunk.register_forward_hook(lambda *_: seen.append(1))
        solve(lm, PROMPTS[0], JUDGE, steps=1, search=3, max_new_tokens=6, **options)
        handle.remove()
        return len(seen)

    # The first answer, its gradient and reading, all tries in one batch, their readings.
    assert passes() == 6 + 1 + 6 + 1
    assert passes(branches=2) == 6 + 1 + 1 + 6 + 1  # branches are read before one is chosen


def test_first_takes_the_smallest_step_that_is_better():
    lm = lm_of()
    solutions = solve(lm, PROMPTS, JUDGE, **LOOSE | {"accept": "first", "steps": 1, "search": 5})
    differs = False
    for solution in solutions:
        better = [one for one in solution.trace[1].tries if one.score > solution.first.score]
        if better:
            assert solution.trace[1].accepted.step == better[0].step
            differs |= max(one.score for one in better) > better[0].score
    assert differs  # here "best" would have taken another
    few = solve(
        lm, PROMPTS, JUDGE, **LOOSE | {"accept": "first", "steps": 1, "search": 5}, at_once=2
    )
    for one, other in zip(solutions, few, strict=True):
        assert one.answer_ids == other.answer_ids
    assert sum(len(s.trace[1].tries) for s in few) < 5 * len(few)


@pytest.mark.slow
def test_a_list_is_its_prompts_alone_and_a_seed_repeats_itself():
    lm = lm_of()
    for direction in ("gradient", "random"):
        options = LOOSE | {"direction": direction}
        whole = solve(lm, PROMPTS, JUDGE, **options)
        again = solve(lm, PROMPTS, JUDGE, **options)
        for prompt, one, same in zip(PROMPTS, whole, again, strict=True):
            assert torch.equal(one.edit.delta, same.edit.delta) and one.answer == same.answer
            alone = solve(lm, prompt, JUDGE, **options)
            assert alone.answer_ids == one.answer_ids
            torch.testing.assert_close(alone.edit.delta, one.edit.delta, rtol=1e-3, atol=1e-4)
    other = solve(lm, PROMPTS, JUDGE, **LOOSE | {"direction": "random", "seed": 1})
    assert any(a.answer_ids != b.answer_ids for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.2}, {"absolute": True}, {"absolute": True, "clip": 1e-3}, {"top_k": 3},
     {"pgd": 0.05}, {"pgd": 0.5, "absolute": True}, {"direction": "random"}],
)  # fmt: skip
def test_a_step_is_what_the_docstring_says(options):
    lm = lm_of()
    given = LOOSE | {"steps": 1, "search": 1, "step_size": 3.0, "threshold": -1.0} | options
    solution = solve(lm, PROMPTS[0], JUDGE, **given)
    assert solution.trace[1].accepted  # a threshold below all differences takes any step
    delta = solution.edit.delta[:, 0]
    first = solution.trace[0].accepted.answer
    ids = greedy(lm, real_rows(lm, PROMPTS[:1], [""])[0][0], 6)
    g = gradient(lm, PROMPTS[:1], [ids], JUDGE)[:, 0]
    assert first == lm.tokenizer.decode(ids, skip_special_tokens=True)
    if options.get("direction") == "random":
        assert abs(torch.cosine_similarity(delta.flatten(), g.flatten(), 0)) < 0.1
        size = delta.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        g = -delta / size * g.norm(dim=-1, keepdim=True)
    recording = lm.record(PROMPTS[:1], "resid@all prompt", show_progress=False)
    length = recording.rows()[0].norm(dim=-1).T.median(1).values[:, None, None]  # [L, 1, 1]
    unit = torch.ones_like(length) if options.get("absolute") else length / 100
    if "pgd" in options:
        wanted = -(3 * g / g.norm(dim=-1, keepdim=True).clamp_min(1e-30) * unit)
        wanted = wanted.clamp(-options["pgd"], options["pgd"])
        assert (wanted.abs() == options["pgd"]).any()
    else:
        if not options.get("absolute"):
            g = g * length
            g = g / g.norm(dim=-1).max()
        wanted = (
            -3 * shaped(g[:, None], options.get("clip", 1.0), options.get("top_k"))[:, 0] * unit
        )
    assert (delta - wanted).norm() <= 1e-3 * wanted.norm()


def test_broken_text_is_never_taken():
    lm = lm_of()
    free = solve(lm, PROMPTS, JUDGE, **LOOSE)
    assert any(s.gain > 0 for s in free)
    strict = solve(lm, PROMPTS, JUDGE, **LOOSE | {"max_perplexity_ratio": 1e-9})
    for solution in strict:
        assert solution.gain == 0 and len(solution.trace) == 2
        assert not any(one.fluent for one in solution.trace[1].tries)
        assert solution.edit.delta.abs().max() == 0
        assert solution.answer == solution.first.answer
    ratio = 1.2
    bound = solve(lm, PROMPTS, JUDGE, **LOOSE | {"max_perplexity_ratio": ratio})
    assert all(s.perplexity <= ratio * s.first.perplexity for s in bound)
    assert any(s.perplexity > ratio * s.first.perplexity for s in free)


def test_repetition_counts_triples_that_were_there_before():
    from trimtab.selfcontrol.search import repetition

    assert repetition([7] * 12) == pytest.approx(9 / 10)
    assert repetition(range(50)) == 0 == repetition([1, 2])


def test_branches_begin_with_the_likeliest_tokens_and_are_completed_greedily():
    from trimtab.selfcontrol.search import complete

    lm = lm_of()
    edit = tt.Add("resid@1 prompt", torch.ones(1, lm.width))
    batch = lm.batch(PROMPTS)
    counts = {"passes": 0}
    handle = lm.anatomy.trunk.register_forward_hook(
        lambda *_: counts.update(passes=counts["passes"] + 1)
    )
    rows = complete(lm, batch, [edit, None, edit], 3, 5)
    handle.remove()
    assert counts["passes"] == 5  # no pass more than one answer alone needs
    for i, own in enumerate((edit, None, edit)):
        ids = batch.ids[i][batch.mask[i].bool()].tolist()
        with torch.no_grad():
            logits = lm(lm.batch(PROMPTS[i]), edits=own).logits[0, -1]
        logits[lm.end_ids] = -math.inf
        for k, token in enumerate(logits.topk(3).indices.tolist()):
            rest, new = list(ids), [token]
            for _ in range(4):
                whole = tt.Batch(torch.tensor([rest + new]), prompt_len=torch.tensor([len(ids)]))
                with torch.no_grad():
                    new.append(int(lm(whole, edits=own).logits[0, -1].argmax()))
            assert rows[3 * i + k] == new
    assert rows[0] != rows[1] != rows[2]


def test_the_best_branch_goes_on():
    lm = lm_of()
    solution = solve(lm, PROMPTS[0], JUDGE, **LOOSE, branches=3)
    first = solution.trace[0]
    assert len(first.tries) == 3 and first.accepted.score == max(t.score for t in first.tries)
    assert len(solution.trace[1].tries) == 9
    single = solve(lm, PROMPTS[0], JUDGE, **LOOSE)
    assert first.accepted.score >= single.first.score


def test_an_initial_response_is_where_it_starts():
    lm = lm_of()
    solution = solve(lm, PROMPTS[0], JUDGE, initial_response="I am a ship.", **LOOSE)
    assert solution.first.answer == "I am a ship."
    score = float(JUDGE.score(lm, [PROMPTS[0]], ["I am a ship."])[0])
    assert solution.first.score == pytest.approx(score, abs=1e-5)


def test_the_edit_is_an_add_like_any_other(tmp_path):
    lm = lm_of()
    solution = next(s for s in solve(lm, PROMPTS, JUDGE, **LOOSE) if s.gain > 0)
    solution.edit.save(tmp_path / "edit")
    loaded = tt.load(tmp_path / "edit")
    ids = lm.generate_ids(lm.batch(solution.prompt), loaded, 6)[0]
    assert ids == list(solution.answer_ids)
    assert loaded.meta.made_by["judges"] == ["Happy? (yes, +1)"]
    nothing = lm.generate_ids(lm.batch(solution.prompt), solution.edit + -1.0 * loaded, 6)[0]
    assert nothing == lm.generate_ids(lm.batch(solution.prompt), None, 6)[0] != ids


def test_options_that_make_no_sense_are_refused():
    lm = lm_of()
    for option, told in (
        ({"search": 0}, "search is a whole number of 1 or more"),
        ({"accept": "all"}, "'first' or 'best', not 'all'"),
        ({"direction": "up"}, "'gradient' or 'random'"),
        ({"step_size": -0.5}, "step_size is above 0"),
    ):
        with pytest.raises(ValueError, match=told):
            solve(lm, "Hi", JUDGE, **option)
    with pytest.raises(TypeError, match="stepsize"):
        solve(lm, "Hi", JUDGE, stepsize=1)


# ---- on the real model ---------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_becomes_happy_by_its_own_judgement(smollm2):
    """A random direction with the same budget is the control."""
    prompts = ["You lose your keys. How do you feel?", "It rains all day. How do you feel?"]
    judge = Judge.named("happiness")
    options = dict(steps=1, search=3, max_new_tokens=24)
    steered = solve(smollm2, prompts, judge, **options)
    chance = solve(smollm2, prompts, judge, direction="random", **options)
    gain, luck = (sum(s.gain for s in found) / 2 for found in (steered, chance))
    assert gain > 0.03 and gain > 2 * luck


@pytest.mark.slow
def test_smollm2_knows_whether_an_answer_is_happy(smollm2):
    examples = tt.data.read("happiness")[:24]
    given = [e.prompt for e in examples], [e.completion for e in examples]
    labels = [e.label for e in examples]
    found = calibrate(smollm2, Judge.named("happiness"), *given, labels, resamples=200)
    assert found.auroc > 0.9 and not found.blind
    blind = calibrate(smollm2, Judge("Are you sad?"), *given, labels, resamples=200)
    assert blind.blind


# ---- evaluation ----------------------------------------------------------------------------------


def test_the_published_pairs_give_the_published_auroc():
    file = DATA / "dpo" / "self-control-data.jsonl"
    if not file.exists():
        pytest.skip("the published preference pairs are not beside the repository")
    import json

    from trimtab.solvers import auroc

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    chosen, rejected = (
        torch.tensor([row[f"{kind}_score"] for row in rows]) for kind in ("positive", "negative")
    )
    scores = torch.cat([chosen, rejected])
    positive = torch.arange(len(scores)) < len(chosen)
    assert float(auroc(scores[:, None], positive)[0]) == pytest.approx(0.893, abs=5e-4)
    low, high = tt.selfcontrol.bootstrap_auroc(scores, positive, resamples=300)
    assert 0.8 < low < 0.893 < high < 0.95


def test_win_rate_gives_a_place_nothing():
    prompts, ours, theirs = [""] * 400, ["long answer"] * 400, ["short"] * 400
    rate = tt.selfcontrol.win_rate
    assert rate(lambda p, a, b: len(a) > len(b), prompts, ours, theirs) == 1.0
    assert rate(lambda p, a, b: len(a) > len(b), prompts, theirs, ours) == 0.0
    assert abs(rate(lambda p, a, b: True, prompts, ours, theirs) - 0.5) < 0.08
    assert rate(lambda p, a, b: True, prompts, ours, ours) == 0.5


def test_an_answer_that_stays_the_same_is_no_progress():
    for direction in ("gradient", "random"):
        tiny = LOOSE | {"step_size": 1e-6, "steps": 1, "direction": direction}
        for solution in solve(lm_of(), PROMPTS * 2, JUDGE, **tiny):
            assert solution.gain == 0 and solution.edit.delta.abs().max() == 0


def test_random_directions_differ_by_iteration():
    lm = lm_of()
    given = LOOSE | {"direction": "random", "search": 1, "threshold": -1.0}
    one, two = (solve(lm, PROMPTS[0], JUDGE, **given | {"steps": n}).edit.delta for n in (1, 2))
    assert torch.cosine_similarity((two - one).flatten(), one.flatten(), 0).abs() < 0.2


def test_a_bound_stands_also_where_the_first_answer_says_nothing():
    lm = lm_of()
    usual = solve(lm, PROMPTS[0], JUDGE, **LOOSE | {"steps": 0}).perplexity
    strict = {"max_perplexity_ratio": 1.2, "initial_response": ""}
    solution = solve(lm, PROMPTS[0], JUDGE, **LOOSE | strict)
    assert all(t.perplexity <= 1.21 * usual for t in solution.trace[1].tries if t.fluent)


def test_the_question_has_room_after_the_longest_answer():
    model = model_zoo.ARCHITECTURES["llama"](max_position_embeddings=128)
    lm = tt.LM(model, zoo.byte_tokenizer("chatml"))
    long = "word " * 30
    solutions = solve(lm, ["Hi", long], JUDGE, **LOOSE | {"max_new_tokens": 200, "steps": 1})
    tail = len(JUDGE.tail(lm).ids)
    for solution in solutions:
        row = len(lm.batch(solution.prompt).ids[0]) + len(solution.answer_ids)
        assert row + tail <= 128
    with pytest.raises(tt.ChatError, match="no room for an answer"):
        solve(lm, "word " * 50, JUDGE, **LOOSE)


def test_a_prompt_that_ends_with_an_answer_is_refused():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}]
    with pytest.raises(tt.ChatError, match="initial_response"):
        solve(lm_of(), turns, JUDGE, **LOOSE)


def test_the_final_number_of_an_answer():
    assert tt.selfcontrol.final_number("#### 18 eggs, 3 left") == "18"
    assert tt.selfcontrol.final_number("1,2,3") == "3"
    exact = tt.selfcontrol.exact_match
    assert exact(["it is 18 dollars.", "so 3 + 4 = 7", "none", "#### 1,000"], ["#### 18", "#### 8",
                 "#### 2", "1000.0"]) == 0.5  # fmt: skip
    assert tt.selfcontrol.final_number("-3.50") == "-3.5"


def test_cosines_are_positive_where_a_direction_helps():
    g = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    found = tt.selfcontrol.cosines(g, -g[:, 1, 2])
    assert found.shape == (2, 3, 4)
    torch.testing.assert_close(found[:, 1, 2], torch.ones(2))
    assert found.abs().mean() < 0.6


@pytest.mark.slow
def test_pictures(tmp_path):
    lm = lm_of()
    solutions = solve(lm, ["<b>Hi</b> & bye", "Hi"], JUDGE, **LOOSE)
    g = gradient(lm, ["Hi"], [[40, 41]], JUDGE)
    norm = tt.selfcontrol.heat_map(g, tmp_path / "map.png", tokens=["Hi", "$"], top_k=3)
    torch.testing.assert_close(norm, g[:, 0, :2].norm(dim=-1))
    for name in ("way.png", "way.html"):
        tt.selfcontrol.trajectory(solutions, tmp_path / name)
    page = (tmp_path / "way.html").read_text()
    tries = sum(len(it.tries) for s in solutions for it in s.trace)
    assert page.count("<circle") == tries and "&lt;b&gt;Hi&lt;/b&gt; &amp; bye" in page
    assert "<b>" not in page and "http" not in page
    assert (tmp_path / "map.png").stat().st_size > 5000
