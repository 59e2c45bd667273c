"""From files to a filled model: finding a checkpoint, naming its tensors, and accounting for every one of them."""

from lamella.checkpoint.files import Checkpoint as Checkpoint
from lamella.checkpoint.files import open_checkpoint as open_checkpoint
from lamella.checkpoint.loader import load_model as load_model
