"""The sampler with the released rules gives the released tokens; filtering gives the released probabilities."""

import pytest
import torch
from dq_golden import STAGE_2, load, model

from dvq_rt.sampling import SamplingParams
from runtimes.errors import InputError
from training.published.samplers import filter_probabilities, keep_top_p, multinomial, sample_published
from training.sampling import filter_logits, sample

MODES = {"fixed": "ordered", "sampled": "drawn"}
CONDS = [(case, cond) for case in STAGE_2 for cond in ("cond0", "cond1") if (case, cond) != ("f_uncond", "cond1")]
TRACE = {"temperature": 0.9, "top_k": 10, "top_p": 0.95, "top_k_position": 8, "top_p_position": 0.9}


def labels_of(case, *conds):
    g = load(case, "greedy")
    return [int(g[f"{cond}.cond"]) if model(case).layout.classes else 0 for cond in conds]


def check_tokens(check, tokens, g, prefix):
    for name, value in tokens._asdict().items():
        check.same(f"{prefix}.{name}", value, g[f"{prefix}.{name}"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("case", "cond"), CONDS)
def test_greedy(check, case, cond, mode):
    """Protects the released rules with all their quirks: tokens, masked logits of every step, code map and image."""
    g, imported, key = load(case, "greedy"), model(case), f"{cond}.{mode}"
    labels, record = labels_of(case, cond), []
    params = SamplingParams(positions=MODES[mode])
    tokens = sample_published(imported.transformer, labels, params, record=record)
    check_tokens(check, tokens, g, key)
    if imported.tokenizer is None:
        return
    for head in ("position", "content"):
        got = torch.cat([draw.logits for draw in record if draw.head == head])
        check.close(f"{head} logits", got, g[f"{key}.{head}_logits_masked"])
    ((content, position),) = tokens.sequences(imported.layout, labels)
    codes = torch.from_numpy(imported.layout.to_map(content, position)[0])[None]
    check.same("code map", codes, g[f"{key}.code_map"])
    with torch.no_grad():
        check.close("image", imported.tokenizer.decode_codes(codes), g[f"{key}.image"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", STAGE_2)
def test_greedy_aligned(check, case, mode):
    """Protects the switch that undoes the shifted positions (Q1) and nothing else; where the quirk mattered, the test
    sees the difference."""
    g, transformer, labels = load(case, "greedy"), model(case).transformer, labels_of(case, "cond0")
    params = SamplingParams(positions=MODES[mode])
    tokens = sample_published(transformer, labels, params, aligned=True)
    check_tokens(check, tokens, g, f"aligned.cond0.{mode}")
    published = sample_published(transformer, labels, params)
    if (case, mode) != ("e2_class_content_only", "sampled"):
        assert not torch.equal(tokens.fine_content, published.fine_content)


@pytest.mark.parametrize("case", ["e_class2_entropy", "e2_class_content_only"])
def test_greedy_batch(check, case):
    """Protects the padding of batches, whose pads are attended to (Q4); the rows differ from those drawn alone."""
    g, transformer, labels = load(case, "greedy"), model(case).transformer, labels_of(case, "cond0", "cond1")
    params = SamplingParams(positions="ordered")
    tokens = sample_published(transformer, labels, params)
    check_tokens(check, tokens, g, "batch.fixed")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", STAGE_2)
def test_stochastic_trace(check, case, mode):
    """Protects temperature, top-k and top-p inside the loop: with the released run's picks replayed, every draw sees
    its probabilities."""
    g = load(case, "stochastic_trace")
    picks, record = iter(g[f"{mode}.picks"]), []
    params = SamplingParams(**TRACE, positions=MODES[mode])
    labels = labels_of(case, "cond0")
    tokens = sample_published(
        model(case).transformer, labels, params, choose=lambda p: next(picks).reshape(1), record=record
    )
    check_tokens(check, tokens, g, mode)
    assert next(picks, None) is None
    width = g[f"{mode}.probs"].shape[1]
    rows = [torch.nn.functional.pad(draw.probabilities, (0, width - draw.probabilities.shape[1])) for draw in record]
    check.close("probabilities", torch.cat(rows), g[f"{mode}.probs"])


def close_up_to_ties(check, name, got, want):
    """Rows with ties: the unstable sort decides which of the equal tokens stays, so the sorted rows are compared."""
    check.close(name, got.sort(-1).values, want.sort(-1).values)


@pytest.mark.parametrize("top_k", [1, 3, 10, 24])
def test_top_k(check, top_k):
    """Protects the rule that ties with the k-th largest stay; forbidden entries stay forbidden."""
    g = load("f2_filtering")
    want = torch.softmax(g[f"topk{top_k}.logits"], -1)
    check.close("published", filter_probabilities(g["logits"], top_k), want)
    corrected, ids = filter_logits(g["logits"], top_k, 1.0)
    check.close("corrected", torch.zeros_like(want).scatter(-1, ids, corrected), want)


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_top_p(check, top_p):
    """Protects the nucleus: the token that reaches ``top_p`` stays, at least one does, the rest is normalised."""
    g = load("f2_filtering")
    want = g[f"topp{top_p}.probs"]
    got = filter_probabilities(g["logits"], None, top_p)
    untied = [0, 2]
    check.close("published", got[untied], want[untied])
    close_up_to_ties(check, "published, ties", got, want)
    corrected, _ = filter_logits(g["logits"], None, top_p)
    close_up_to_ties(check, "corrected", corrected / corrected.sum(-1, keepdim=True), want)


@pytest.mark.parametrize("top_k", [3, 10])
@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_top_k_with_top_p(check, top_k, top_p):
    """Protects the order of the two: top-p counts the mass that top-k left."""
    g = load("f2_filtering")
    want = g[f"topk{top_k}.topp{top_p}.probs"]
    close_up_to_ties(check, "published", filter_probabilities(g["logits"], top_k, top_p), want)
    corrected, _ = filter_logits(g["logits"], top_k, top_p)
    close_up_to_ties(check, "corrected", corrected / corrected.sum(-1, keepdim=True), want)


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75, 1.0])
def test_top_p_at_exact_sums(check, top_p):
    """Protects "at least", not "more than": after the token at which the sum is exactly ``top_p`` all are dropped."""
    g = load("f2_filtering")
    close_up_to_ties(check, "exact", keep_top_p(g["exact.probs"], top_p), g[f"exact.topp{top_p}"])


@pytest.mark.parametrize("mode", MODES)
def test_rules(mode):
    """Protects the door to both rules: they return sequences of one form, and the same seed gives the same tokens."""
    imported = model("e_class2_entropy")
    params = SamplingParams(top_k=10, positions=MODES[mode])
    for rules in ("corrected", "published"):
        first, again, other = (
            sample(imported.transformer, [3, 5], params, seed=seed, rules=rules) for seed in (1, 1, 2)
        )
        assert first == again != other
        for content, position in first:
            assert len(content) == len(position) <= imported.layout.max_length
            assert content[0] in (imported.layout.content_sos + 3, imported.layout.content_sos + 5)
            codes, _ = imported.layout.to_map(content, position)
            assert codes.shape == (8, 8)
    with pytest.raises(InputError, match="rules are 'upstream'"):
        sample(imported.transformer, [0], params, rules="upstream")


def test_refusals():
    """Protects against parameters that the released rules cannot honour: each gets a named error."""
    transformer = model("e2_class_content_only").transformer
    with pytest.raises(InputError, match="guidance is 2"):
        sample_published(transformer, [0], SamplingParams(guidance=2.0))
    with pytest.raises(InputError, match="top_k is 300"):
        sample_published(transformer, [0], SamplingParams(top_k=300))
    with pytest.raises(InputError, match="labels are empty"):
        sample_published(transformer, [])


def test_block_size():
    """Protects against running off the index table: a padded batch can need more tokens than any one image."""
    import copy

    transformer = copy.deepcopy(model("e2_class_content_only").transformer)
    object.__setattr__(transformer.config, "block_size", 20)
    with pytest.raises(InputError, match="block_size of 20"):
        sample_published(transformer, [0, 1], choose=multinomial(torch.Generator().manual_seed(0)))
