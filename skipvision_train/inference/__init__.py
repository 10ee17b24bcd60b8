"""Ask a model under a plan: :class:`Assistant` in Python, ``skipvision generate`` and ``serve`` on top of it."""

from skipvision_train.inference.assistant import Assistant, Stream
from skipvision_train.inference.conversation import Conversation
from skipvision_train.inference.decoding import Sampling
from skipvision_train.inference.replies import Reply

__all__ = ["Assistant", "Conversation", "Reply", "Sampling", "Stream"]
