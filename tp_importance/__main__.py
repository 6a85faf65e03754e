"""``python -m tp_importance``: prune a network of torchvision, timm or your own from the command line."""

from .core.optional import optional_import

if __name__ == "__main__":
    optional_import("click")
    from .cli.commands import main

    main(prog_name="python -m tp_importance")
