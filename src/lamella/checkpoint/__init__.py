"""Loading of checkpoints: find the files, map tensor names to parameters, and check that every tensor is used."""

from lamella.checkpoint.files import Checkpoint as Checkpoint
from lamella.checkpoint.files import open_checkpoint as open_checkpoint
from lamella.checkpoint.loader import load_model as load_model
