"""What the host itself warns about here, and one parameter a method."""

from __future__ import annotations

import pathlib

import pytest
import transformers

from .cases import METHODS

HERE = pathlib.Path(__file__).parent

HOST_WARNINGS = (
    # peft 0.21 still calls the old names, transformers 5 deprecates them.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # A transformers model with two adapters of its own `add_adapter`: the intended use.
    "ignore:Already found a `peft_config` attribute:UserWarning",
    # Deleting the active adapter: the host says which one is next.
    "ignore:Adapter .* was active which is now deleted:UserWarning",
    # It takes the bias of a LoRA adapter for a broken matrix.
    "ignore:Adapter .* have invalid shape:UserWarning",
    # LoRA on embeddings, which it then saves as well.
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    # GPT-2's linears are transposed, and it finds out by itself.
    "ignore:fan_in_fan_out is set to False:UserWarning",
    # Models that are built here have no file to compare the vocabulary with.
    "ignore:Could not find a config file in:UserWarning",
)


def allow_host_warnings(items: list[pytest.Item], folder: pathlib.Path) -> None:
    """Do not fail the tests in `folder` for what the host itself warns about."""
    for item in items:
        if folder in item.path.parents:
            for warning in HOST_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    allow_host_warnings(items, HERE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "method" in metafunc.fixturenames and not any(
        "method" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
