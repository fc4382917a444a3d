"""Every rule of the linter finds its fault, there and nowhere else, and lets the sound model be."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, parser

from effuse.lint import NEWEST, RULES, lint
from effuse.lint_rules_trt_ops import ATTRIBUTES

TABLE = tomllib.loads(Path(__file__).with_name("lint_cases.toml").read_text(encoding="utf-8"))


def ones(match):
    """`ones(float s 2 3)` as the initializer `float[2,3] s = {1, 1, 1, 1, 1, 1}`."""
    kind, name, *sizes = match[1].split()
    return f"{kind}[{','.join(sizes)}] {name} = {{{', '.join(['1'] * prod(map(int, sizes)))}}}"


def parse(text):
    return parser.parse_model(re.sub(r"ones\((.*?)\)", ones, text))


def edited(text, edits):
    text = " ".join(text.split())
    for old, new in (edit.split(" => ") for edit in edits):
        assert old in text, old
        text = text.replace(old, new)
    return text


def stored(folder, location="w.bin", length=16):
    """A file whose weight is external data, of which 16 bytes are there."""
    (folder / "inner").mkdir(exist_ok=True)
    for place in (folder, folder / "inner"):
        (place / "w.bin").write_bytes(np.ones(4, np.float32).tobytes())
    count = length // 4
    text = f"g (float[{count}] x) => (float[{count}] y) <ones(float w {count})> {{ y = Add(x, w) }}"
    model = parse('<ir_version: 10, opset_import: ["" : 21]> ' + text)
    weight = model.graph.initializer[0]
    del weight.float_data[:]
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    path = folder / "inner" / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def weighing(count):
    """A model with a weight of so many float32, which reading would compute."""

    def compute():
        raise AssertionError("the linter read a large weight")

    model = ir.serde.deserialize_model(parse(TABLE["bases"]["norm"]))
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        compute, dtype=ir.DataType.FLOAT, shape=ir.Shape((count,)), name="w"
    )
    return model


def twins(name):
    model = parse(TABLE["bases"]["typed"])
    model.graph.node[0].name, model.graph.node[1].name = "one", name
    return model


@dataclass
class Case:
    rule: str
    sound: object  # folder -> what is linted
    faulty: object
    at: list


def from_table(row):
    text = " ".join(TABLE["bases"][row["base"]].split())
    broken = edited(text, row["edits"])
    return Case(row["rule"], lambda _: parse(text), lambda _: parse(broken), row["at"])


CASES = (
    *map(from_table, TABLE["cases"]),
    Case("common unique-names", lambda _: twins("two"), lambda _: twins("one"), [1]),
    Case("common file-size", lambda _: weighing(2000), lambda _: weighing(1 << 29), ["model"]),
    Case("common external-folder", stored, lambda f: stored(f, "../w.bin"), ["model"]),
    Case("common external-range", stored, lambda f: stored(f, length=32), ["model"]),
)


def rule_of(case):
    family, name = case.rule.split()
    found = [
        rule for rule in RULES if rule.id == name and (family in rule.targets or family == "common")
    ]
    assert len(found) == 1, case.rule
    return found[0]


def target_of(rule):
    """A target and a version that have the rule."""
    family = rule.targets[0]
    newest = next(number for whose, number in NEWEST.values() if whose == family)
    version = rule.since or newest
    if rule.until and version >= rule.until:
        major, minor = rule.until
        version = (major, minor - 1) if minor else newest
    text = ".".join(map(str, version))
    return (f"tensorrt-{version[0]}" if family == "tensorrt" else family), text


def places(model, rule):
    return [finding.place for finding in lint(model, *target_of(rule)) if finding.rule == rule.id]


@pytest.mark.parametrize("case", CASES, ids=[case.rule.replace(" ", ":") for case in CASES])
def test_a_rule_finds_its_fault_and_nothing_else(case, tmp_path):
    rule = rule_of(case)
    wanted = ["the model" if at == "model" else f"node {at}" for at in case.at]
    assert places(case.sound(tmp_path), rule) == []
    assert places(case.faulty(tmp_path), rule) == wanted


def test_every_rule_has_a_case():
    covered = {id(rule_of(case)) for case in CASES}
    assert [rule.id for rule in RULES if id(rule) not in covered] == []


def test_a_rule_is_named_once_for_a_target_and_version():
    for family, newest in NEWEST.values():
        names = [rule.id for rule in RULES if rule.applies(family, newest)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("name", TABLE["bases"])
def test_the_sound_models_are_valid_onnx(name):
    onnx.checker.check_model(parse(TABLE["bases"][name]), full_check=True)


@pytest.mark.parametrize("rule", [r for r in RULES if r.until], ids=lambda rule: rule.id)
def test_a_rule_ends_with_its_version(rule):
    major, minor = rule.until
    before = (major, minor - 1) if minor else (major - 1, 99)
    assert rule.applies(rule.targets[0], before)
    assert not rule.applies(rule.targets[0], rule.until)
    assert not rule.applies("nobody", before)


def test_every_rule_says_where_it_is_written():
    for rule in RULES:
        assert re.search(r"; https://[^ ]+$", rule.source), rule.id
        assert rule.rule.endswith(".") and rule.remedy.endswith("."), rule.id


@pytest.mark.parametrize("op,name,allowed", ATTRIBUTES)
def test_the_attributes_that_the_parser_takes(op, name, allowed):
    wrong = "max" if isinstance(allowed[0], str) else allowed[0] + 3
    listed = name == "dilations"

    def found(value):
        node = helper.make_node(op, ["x"], ["y"], **{name: [value, value] if listed else value})
        value_info = [helper.make_tensor_value_info(each, 1, None) for each in "xy"]
        graph = helper.make_graph([node], "g", value_info[:1], value_info[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
        return [each.found for each in lint(model, "tensorrt-11") if each.rule == "attribute"]

    assert found(wrong) and name in found(wrong)[0]
    assert [found(value) for value in allowed] == [[]] * len(allowed)
