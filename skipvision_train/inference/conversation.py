"""What was said and shown so far: an immutable value, so that a chat is a list of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from skipvision_train.data.images import load_image
from skipvision_train.data.records import IMAGE_MARKER, Turn
from skipvision_train.errors import DataError

Picture = Image.Image | str | Path
"""An image, or the file that holds it."""


@dataclass(frozen=True)
class Conversation:
    """Turns, and the images that they show.

    Attributes:
        turns: an optional system turn, then user and assistant in alternation; a user's text holds ``<image>`` where an
            image stands.
        images: in the order of their markers.
    """

    turns: tuple[Turn, ...] = ()
    images: tuple[Image.Image, ...] = ()

    @classmethod
    def begin(cls, system: str | None = None) -> Conversation:
        """An empty conversation, or one with a system turn."""
        return cls(() if system is None else (Turn("system", system),))

    def ask(self, text: str, images: Sequence[Picture] = ()) -> Conversation:
        """The same, and a question about ``images``.

        Args:
            text: without any ``<image>`` in it the images stand first.
            images: decoded, or files.

        Raises:
            DataError: an answer is due first, markers and images disagree, or an image cannot be read.
        """
        if self.turns and self.turns[-1].role == "user":
            raise DataError("conversation: the last question has no answer yet")
        if IMAGE_MARKER not in text:
            text = "\n".join([IMAGE_MARKER] * len(images) + [text])
        if (markers := text.count(IMAGE_MARKER)) != len(images):
            raise DataError(f"prompt: {markers} {IMAGE_MARKER} markers, but {len(images)} images; use one per image")
        shown = tuple(_opened(image) for image in images)
        return replace(self, turns=(*self.turns, Turn("user", text)), images=(*self.images, *shown))

    def answered(self, text: str) -> Conversation:
        """The same with the answer to its last question.

        Raises:
            DataError: nothing was asked.
        """
        self.check()
        return replace(self, turns=(*self.turns, Turn("assistant", text)))

    def check(self) -> None:
        """Refuse a conversation that asks nothing.

        Raises:
            DataError: the last turn is not a user's.
        """
        if not self.turns or self.turns[-1].role != "user":
            raise DataError("conversation: it must end with a question; Conversation.ask adds one")


def _opened(image: Picture) -> Image.Image:
    return image if isinstance(image, Image.Image) else load_image(image, "of the prompt")
