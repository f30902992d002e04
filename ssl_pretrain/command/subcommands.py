"""The sub-commands of `ssl-pretrain` and the modules that they run."""

import importlib
import sys
from dataclasses import dataclass

from ssl_pretrain.system import program


@dataclass(frozen=True)
class Subcommand:
    """A sub-command that runs the command line of a module."""

    module: str  # module below ssl_pretrain that has a `main`
    summary: str
    arguments: tuple[str, ...] = ()  # options that the sub-command adds

    @property
    def module_command(self) -> str:
        """Start of the command line without the console script, as the help texts write it."""
        if self.module.startswith("launch.") and self.module != "launch.dashboard":
            return f"python {self.module.replace('.', '/')}.py"
        return f"python -m ssl_pretrain.{self.module}"


GROUPS: dict[str, dict[str, Subcommand]] = {
    "start": {
        "demo": Subcommand("launch.demo", "pretrain on real digits, evaluate and write a report"),
        "inspect": Subcommand("planning.inspect", "describe images and suggest a configuration"),
        "pretrain": Subcommand("launch.pretrain", "pretrain, then evaluate, here or on SLURM"),
        "train": Subcommand("train", "pretrain only, in this process or on torchrun's ranks"),
        "plan": Subcommand("launch.pretrain", "print the costs of a run without it", ("--plan",)),
        "sweep": Subcommand("launch.sweep", "pretrain once per combination of values"),
        "beton": Subcommand("data.beton.__main__", "write, check or describe a .beton file"),
        "shards": Subcommand("data.tar.__main__", "write or index tar shards"),
    },
    "evaluate": {
        "evaluate": Subcommand("launch.evaluate", "run the evaluations that checkpoints lack"),
        "knn": Subcommand("eval.knn", "k-NN accuracy of frozen features"),
        "linear": Subcommand("eval.linear", "accuracy of a linear classifier"),
        "attentive": Subcommand("eval.attentive", "accuracy of an attentive probe of the patches"),
        "fewshot": Subcommand("eval.fewshot", "accuracy with few labels on several data sets"),
        "semi": Subcommand("eval.semi", "accuracy after fine-tuning on few labels"),
        "finetune": Subcommand("eval.finetune", "accuracy after fine-tuning on all labels"),
        "detection": Subcommand("eval.detection.__main__", "object detection with the backbone"),
        "segmentation": Subcommand("eval.segmentation", "semantic segmentation with the backbone"),
        "retrieval": Subcommand("eval.retrieval", "image retrieval and near-duplicates"),
        "robustness": Subcommand("eval.robustness", "accuracy on corrupted images"),
        "spectrum": Subcommand("eval.spectrum", "rank and spectrum of the features"),
        "zeroshot": Subcommand("eval.zeroshot", "accuracy by the names of the classes, with texts"),
        "captions": Subcommand("eval.captions", "retrieval of captions by images, and back"),
        "sts": Subcommand("eval.sts", "similarity of sentences against people's scores"),
        "text_pairs": Subcommand("eval.text_pairs", "retrieval of the second text of pairs"),
        "attention": Subcommand("eval.attention", "attention maps of a ViT as pictures"),
    },
    "use the results": {
        "runs": Subcommand("eval.run_list", "show the state and the numbers of all runs, live"),
        "report": Subcommand("eval.report", "write the report page of a run"),
        "compare": Subcommand("eval.compare", "write a page that compares runs"),
        "embed": Subcommand("eval.embed", "write the features of images into a file"),
        "index": Subcommand("eval.index", "index the features of images for searches"),
        "search": Subcommand("eval.search", "find the images that are nearest to others"),
        "export": Subcommand("eval.export", "export the backbone for other libraries"),
        "hub": Subcommand("eval.hub", "upload an export to the Hugging Face Hub"),
        "serve": Subcommand("eval.serve", "answer over HTTP with vectors, similarities, neighbors"),
        "dashboard": Subcommand("launch.dashboard", "save a W&B view of a project's runs"),
        "replay": Subcommand("replay", "repeat one step and find non-finite values"),
    },
}
LOOK_UP = {
    "list": "list methods, configs, backbones or optimizers",
    "help": "explain a key, a section or a sub-command",
    "completion": "print the completion script of bash, zsh or fish",
}
SUBCOMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}
NAMES = [*SUBCOMMANDS, *LOOK_UP]


def run(name: str, arguments: list[str]) -> int:
    """Run a sub-command and return its exit status.

    Args:
        name: Name of the sub-command.
        arguments: Arguments of the user.
    """
    subcommand = SUBCOMMANDS[name]
    module = importlib.import_module(f"ssl_pretrain.{subcommand.module}")
    words = [*subcommand.arguments, *arguments]
    program.run_as(name)
    sys.argv[1:] = words
    try:
        if not subcommand.module.startswith("eval."):
            return int(module.main(words) or 0)
        from ssl_pretrain.eval import command_line

        module_name = f"ssl_pretrain.{subcommand.module}".removesuffix(".__main__")
        command_line.execute(module.main, module_name)
        return 0
    finally:
        program.run_as("")
