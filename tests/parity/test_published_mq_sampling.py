"""The sampler with the released MQ rules gives the released tokens; filtering gives the released probabilities."""

import pytest
import torch
from mq_golden import IMAGES, LOGITS, PURE, STAGE_2, extra, load, model, to_released

from dvq_rt.layout import TokenLayout
from dvq_rt.sampling import SamplingParams
from runtimes.errors import InputError
from training.models.transformer import StackedTransformer, TransformerConfig
from training.published.samplers import filter_probabilities, keep_top_p, multinomial, sample_published_kept
from training.sampling import filter_logits, sample, sample_tokens

GREEDY = SamplingParams(top_k=1, top_k_position=1, positions="drawn")


def labels_of(case, batch):
    """The first ``batch`` labels of a case; three rows are greedy runs of three labels, or of one start."""
    return load(case, "inputs")["class_label"][:batch].tolist() if model(case).layout.classes else [0] * batch


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", STAGE_2)
def test_greedy(check, case, batch):
    """Protects the released rules: tokens, raw logits and margins of every step, and the images of the tokens."""
    g, imported, labels, record = load(case), model(case), labels_of(case, batch), []
    layout, key = imported.layout, f"greedy_b{batch}"
    drawn = sample_published_kept(imported.transformer, labels, record=record)
    check.same("codes", drawn.content, g[f"{key}_codes"])
    check.same("positions", drawn.position, g[f"{key}_positions"])
    for head, name in (("content", "value"), ("position", "position")):
        logits = torch.stack([draw.logits for draw in record if draw.head == head], 1)
        two = logits.topk(2).values
        check.close(f"{name} margin", two[..., 0] - two[..., 1], g[f"{key}_margin_{name}"], **LOGITS)
        if batch == 3:
            row = to_released(layout, logits[0]) if head == "content" else logits[0]
            raw = g[f"{key}_row0_raw_{name}_logits"].masked_fill(row.isinf(), -torch.inf)
            assert raw.isinf().any(1).all()
            check.close(f"{name} logits", row, raw, **LOGITS)
    if f"{key}_image" in g:
        with torch.no_grad():
            image = imported.tokenizer.decode_codes(drawn.content, drawn.position)
        check.close("image", image, g[f"{key}_image"], **IMAGES)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", STAGE_2)
def test_greedy_by_every_rule(case, batch):
    """Protects the corrected sampler, the engine's oracle: with drawn positions and one candidate per draw it gives the
    released greedy tokens, and so does the released stochastic one."""
    g, imported, labels = load(case), model(case), labels_of(case, batch)
    starts = [imported.layout.start(0, label) for label in labels]
    want = [
        ([start[0], *codes], [start[1], *positions])
        for start, codes, positions in zip(
            starts, g[f"greedy_b{batch}_codes"].tolist(), g[f"greedy_b{batch}_positions"].tolist(), strict=True
        )
    ]
    assert sample_tokens(imported.transformer, labels, GREEDY) == want
    assert sample(imported.transformer, labels, GREEDY, rules="published") == want


@pytest.mark.parametrize("row", extra("filters")["cases"], ids=lambda row: row["name"])
def test_filters(check, row):
    """Protects temperature, top-k and top-p: ties with the k-th largest stay, the token that reaches ``top_p`` stays,
    the rest is normalised. Where ties meet top-p an unstable sort decides which of them stays, so those rows are
    compared sorted."""
    given, want, top_p = load("filters", "inputs"), load("filters")[row["name"]], row.get("top_p")
    if row["name"].startswith("dyadic"):
        got = keep_top_p(given["dyadic_probs"], top_p)
        check.close("dyadic", got, want, **PURE)
        return
    logits, top_k = given["logits"] / row["temperature"], row["top_k"]
    got = filter_probabilities(logits, top_k, top_p)
    untied = slice(0, 5 if top_p else 6)
    check.close("published", got[untied], want[untied], **PURE)
    check.close("published, ties", got.sort(-1).values, want.sort(-1).values, **PURE)
    corrected, _ = filter_logits(logits, top_k, top_p or 1.0)
    corrected = corrected / corrected.sum(-1, keepdim=True)
    check.close("corrected", corrected.sort(-1).values, want.sort(-1).values, **PURE)


def test_draws(check):
    """Protects the loop with filters on: every draw sees one temperature, the filters of its head, no start ids and no
    position twice; the same seed gives the same tokens through the door to both rules."""
    case = "stackformer_class"
    imported, record = model(case), []
    layout = imported.layout
    params = SamplingParams(
        temperature=0.7, top_k=5, top_p=0.9, top_k_position=4, top_p_position=0.8, positions="drawn"
    )
    generator = torch.Generator().manual_seed(3)
    drawn = sample_published_kept(imported.transformer, [3, 0], params, choose=multinomial(generator), record=record)
    assert [draw.head for draw in record] == ["content", "position"] * layout.kept
    assert drawn.content.max() < layout.codebook_size and drawn.position.max() < layout.cells
    assert all(len(set(row)) == layout.kept for row in drawn.position.tolist())
    for draw in record:
        top_k, top_p = (5, 0.9) if draw.head == "content" else (4, 0.8)
        check.close(draw.head, draw.probabilities, filter_probabilities(draw.logits, top_k, top_p), **PURE)
        assert (draw.probabilities > 0).sum(1).max() <= top_k
    first = torch.stack([draw.logits for draw in record if draw.head == "content"])[0, 0]
    raw = load(case)["greedy_b3_row0_raw_value_logits"][0]
    check.close("temperature", to_released(layout, first)[10:], raw[10:] / 0.7, **LOGITS)
    same, again, other = (sample(imported.transformer, [3, 0], params, seed=s, rules="published") for s in (1, 1, 2))
    assert same == again != other


def random_transformer(**layout):
    """A small one whose every draw matters."""
    torch.manual_seed(0)
    sizes = TransformerConfig(width=32, heads=2, block_size=9, segment_embedding=False)
    net = StackedTransformer(sizes, TokenLayout(20, (4,), classes=2, kept=9, **layout)).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.mul_(3)
    return net


def test_position_first():
    """Protects the mirrored order of the heads: greedy by the released rules is greedy by the corrected ones."""
    net, record = random_transformer(label_in_position=False), []
    drawn = sample_published_kept(net, [1, 0], record=record)
    assert [draw.head for draw in record[:2]] == ["position", "content"]
    assert drawn.sequences(net.layout, [1, 0]) == sample_tokens(net, [1, 0], GREEDY)
    assert len(set(map(tuple, drawn.position.tolist()))) == 2, "the label must matter"


def test_start_ids_are_never_drawn():
    """Protects the cells: however probable another label's start id is, it is no position."""
    for factor in (100, -100):  # one of the two makes it the most probable
        net = random_transformer(first="content")
        net.position_head.linear.weight[net.layout.cells :] *= factor
        assert sample_published_kept(net, [1, 0]).position.max() < net.layout.cells


def test_greedy_positions_go_by_logits():
    """Protects near-ties: the greedy position is the largest logit even where the probabilities have rounded to ties
    (Q17), so a tiny scale of the logits changes nothing."""
    net = random_transformer(first="content", label_in_position=False)
    want = sample_published_kept(net, [1, 0])
    net.position_head.linear.weight *= 1e-9
    record = []
    got = sample_published_kept(net, [1, 0], record=record)
    assert any((draw.probabilities.topk(2).values.diff() == 0).any() for draw in record if draw.head == "position")
    assert torch.equal(got.position, want.position) and torch.equal(got.content, want.content)


@pytest.mark.parametrize("case", STAGE_2)
def test_no_filter(case):
    """Protects the unfiltered draw: a ``top_p`` of 1 is the released None, which drops no tail and rescales nothing."""
    record = []
    sample_published_kept(model(case).transformer, labels_of(case, 3), record=record)
    assert all(torch.equal(draw.probabilities, torch.softmax(draw.logits, -1)) for draw in record)
    rescaled = (torch.equal(filter_probabilities(draw.logits, None, 1.0), draw.probabilities) for draw in record)
    assert not all(rescaled), "the difference must be visible"


def test_refusals():
    """Protects against parameters that the released rules cannot honour: each gets a named error."""
    transformer = model("stackformer_class").transformer
    for params, message in (
        (SamplingParams(), "positions are 'ordered'"),
        (SamplingParams(guidance=2.0, positions="drawn"), "guidance is 2"),
        (SamplingParams(top_k=51, positions="drawn"), "top_k is 51"),
    ):
        with pytest.raises(InputError, match=message):
            sample(transformer, [0], params, rules="published")
    with pytest.raises(InputError, match="labels are empty"):
        sample_published_kept(transformer, [])
    covering = StackedTransformer(TransformerConfig(width=8, heads=1), TokenLayout(4, (1, 2)))
    with pytest.raises(InputError, match="use sample_published"):
        sample_published_kept(covering, [0])
