"""``jaxrl-post export``"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxrl_post.cli.evaluate import is_run
from jaxrl_post.errors import InputError

SUMMARY = "write a run's model for others to open"
DESCRIPTION = """\
Write the newest checkpoint of a run as a Hugging Face folder: config, weights,
tokenizer with its chat template, generation config, and a model card with recipe, data,
seed and results. An adapter is merged into its base, or with --adapter written alone,
as peft opens it.

  jaxrl-post export runs/quickstart exported/quickstart"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN", help="a run's folder")
    parser.add_argument("out", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--adapter", action="store_true", help="write the adapter without its base"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model that OUT holds"
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder and prints its path."""
    run_dir, out = Path(arguments.run_dir), Path(arguments.out).expanduser()
    if not is_run(run_dir):
        raise InputError(
            f"{run_dir}: no run's folder, for it has no config.yaml; name one that "
            "`jaxrl-post train` has written."
        )
    from jaxrl_post import models, report
    from jaxrl_post.models.weights_out import refuse_folder
    from jaxrl_post.tasks.lookup import is_own
    from jaxrl_post.training.checkpoints import Checkpoints, load_policy

    marker = "adapter_config.json" if arguments.adapter else "config.json"
    refuse_folder(out, arguments.overwrite, marker)
    of_run = report.read_run(run_dir)
    base = of_run.setting("model.path")
    if is_own(base):
        raise InputError(
            f"{run_dir}: model.path={base!r} is a model of your own, which "
            "transformers cannot open; its parameters are "
            f"{run_dir}/model/params.safetensors."
        )
    if arguments.adapter and of_run.setting("model.lora") is None:
        raise InputError(
            f"{run_dir}: trained the model's own weights (model.lora is null), there "
            "is no adapter; leave out --adapter."
        )
    policy, params, tokenizer = load_policy(run_dir)
    checkpoints = Checkpoints(run_dir, read_only=True)
    try:
        step = checkpoints.latest() or 0
        code = checkpoints.about(step).get("about", {}).get("code")
    finally:
        checkpoints.close()
    card = report.model_card(
        of_run, out.name, step=step, code=code, adapter=arguments.adapter
    )
    if arguments.adapter:
        models.save_adapter(
            policy,
            params,
            tokenizer,
            out,
            base=base,
            card=card,
            overwrite=arguments.overwrite,
        )
    else:
        models.save(
            policy,
            params,
            tokenizer,
            out,
            card=card,
            overwrite=arguments.overwrite,
            # As in training: the whole distribution, at its temperature.
            generation={
                "do_sample": True,
                "temperature": of_run.settings("sampling.temperature")[-1],
                "top_k": 0,
                "top_p": 1.0,
            },
        )
    print(out)
    return 0
