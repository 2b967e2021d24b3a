"""What can go wrong, by kind. Every message carries the value given and what to do instead."""


class TrimtabError(Exception):
    """The base of every error that Trimtab raises on purpose."""


class PlaceError(TrimtabError, ValueError):
    """A place, an edit's shape, or a token selector does not fit this model or this batch."""


class ArtifactError(TrimtabError, ValueError):
    """A file or folder is missing, damaged, of another format, or made for another model."""


class ChatError(TrimtabError, ValueError):
    """A prompt or a conversation cannot be turned into token ids."""


class BusyError(TrimtabError, RuntimeError):
    """Another thread is running this model, and waiting was not asked for."""
