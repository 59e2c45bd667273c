"""Former path of the `config.json` reader, kept for architectures of other packages; it is now in `lamella.config`."""

from lamella.config.hf_config import HFConfig as HFConfig
from lamella.config.hf_layers import read_activation as read_activation
from lamella.config.hf_layers import read_head_dim as read_head_dim
from lamella.config.hf_layers import read_model as read_model
from lamella.config.hf_layers import read_output_bias as read_output_bias
from lamella.config.hf_layers import read_windows as read_windows
from lamella.config.hf_rope import read_rope as read_rope
