"""The quickstart's model under LightningCLI: `python examples/cli.py fit --config examples/config.yaml`."""

from lightning.pytorch.cli import LightningCLI
from quickstart import CharacterModel, HelpText

if __name__ == "__main__":
    LightningCLI(CharacterModel, HelpText)
