"""`ltx-train evaluate swap`: does the output follow the reference? Generation with the reference swapped decides."""

from __future__ import annotations

from ltx_train import config as configuration
from ltx_train.assembly import from_config, model_builder, resolve
from ltx_train.assembly.checked_data import open_heldout
from ltx_train.assembly.closing import close
from ltx_train.assembly.saved_run import open_run
from ltx_train.assembly.setup import forward_only
from ltx_train.assembly.swap_test import SwapTest
from ltx_train.config import Config
from ltx_train.contracts import ConfigError, Exit
from ltx_train.evaluation import swap, swap_page
from ltx_train.evaluation.swap import OFF, ON

_PAGE = "swap.html"


def run(config: Config) -> int:
    """Writes swap.html into the run's folder and prints the verdict."""
    folder = from_config.run_dir(config)
    trained_with, checkpoint = open_run(folder, config.export.step)
    if resolve.trains_all_weights(trained_with):
        raise ConfigError("the swap test compares with the adapter off: a full fine-tune has no base beside it")
    setup = forward_only(resolve.with_strategy_of(configuration.continued(config, trained_with, 1), trained_with))
    configuration.refuse_drift(trained_with, setup.config, folder)
    root, index = open_heldout(setup.config)
    test = SwapTest(setup, root, index)
    transformer = model_builder.open_saved(setup, checkpoint)
    swapped = test.run(transformer, folder / "samples" / "swap")
    verdict = swap.verdict(swapped.outputs, swapped.references)
    title = f"{folder.parent.name}/{folder.name}, step {checkpoint.step}: the reference swapped"
    swap_page.write(
        folder / _PAGE, title, swapped.outputs, swapped.references, clips=swapped.clips, verdict=verdict
    )  # fmt: skip
    for arm in (ON, OFF):
        shares = (
            f"{a.value} {swap.followed(swapped.outputs, arm, swapped.references, a)}"
            for a in swap.aspects(swapped.references)
        )
        print(f"{arm}: {', '.join(shares)}, latents {swap.distance(swapped.outputs, arm)}")
    print(verdict.text)
    close(folder / _PAGE, f"ltx-train export {folder}")
    return Exit.DONE
