from __future__ import annotations

import pytest
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: int = Field(ge=1)
    name: str


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    rate: float = 1.0
    sizes: tuple[int, ...] = ()
    inner: Inner | None = None


def test_nodes_of_a_configuration_and_dictionaries_are_read_alike():
    config = OmegaConf.create({"base": 3, "node": {"rate": "${base}", "inner": {"size": "${base}", "name": "x"}}})
    expected = Outer(rate=3, inner=Inner(size=3, name="x"))
    assert checked_options(Outer, "node", config.node) == expected
    assert checked_options(Outer, "node", dict(config.node)) == expected
    assert checked_options(Outer, "node", None) == Outer()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rat": 1}, r"^a\.node\.rat: .*not permitted; known keys are rate, sizes, inner$"),
        ({"rate": "fast"}, r"^a\.node\.rate: .*number.*; known keys are rate, sizes, inner$"),
        ({"inner": {"size": 1, "nam": "x"}}, r"^a\.node\.inner\.nam: .*not permitted; known keys are size, name$"),
        ({"inner": {"size": 0, "name": "x"}}, r"^a\.node\.inner\.size: .*greater.*; known keys are size, name$"),
        ({"sizes": [1, "x"]}, r"^a\.node\.sizes\.1: .*integer.*; known keys are rate, sizes, inner$"),
    ],
)
def test_a_wrong_option_is_named_with_the_keys_of_its_node(given, message):
    with pytest.raises(InputError, match=message):
        checked_options(Outer, "a.node", given)
