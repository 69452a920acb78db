"""What the resolver is asked for on behalf of the recipes."""

import re

import pytest
from kernels.check_recipes import RECIPES, ROOT, recipe_lines, requirements, target


@pytest.mark.parametrize("page", sorted(RECIPES.glob("*.md")), ids=lambda page: page.stem)
def test_a_recipe_names_its_target_and_pins_what_it_installs(page):
    text = page.read_text(encoding="utf-8")
    assert target(text)[0] in text.split("| Python |")[-1] or page.stem == "h100-h200"
    lines = recipe_lines(text)
    assert lines
    for wanted in map(requirements, lines):
        assert all(re.search(r"==\d", word) or word.startswith(str(ROOT)) for word in wanted), wanted


def test_the_full_tensorrt_stands_for_its_bindings():
    given = ["tensorrt==8.6.1.post1", "numpy==1.26.4", "--extra-index-url", "https://pypi.nvidia.com"]
    assert requirements(given) == ["tensorrt-bindings==8.6.1", "numpy==1.26.4"]
    assert requirements(["tensorrt-cu12==10.4.0"]) == ["tensorrt-cu12-bindings==10.4.0"]
    both = ["tensorrt-rtx-cu13-bindings==1.7", "tensorrt-rtx-cu13-libs==1.7"]
    assert requirements([".[build]", "tensorrt-rtx-cu13==1.7"]) == [f"{ROOT}[build]", *both]


def test_a_page_without_a_target_is_refused():
    with pytest.raises(ValueError, match=r"resolver: 3\.11 x86_64"):
        target("# A GPU")
