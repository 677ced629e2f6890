"""From files or a stream of documents to batches of tokens, the same on every layout.

The way of a document: :mod:`.sources` finds it (:mod:`.corpus` on disk, :mod:`.hub` by name),
:mod:`.order` says when its turn comes and in which stream, :mod:`.packing` turns each stream into
windows of tokens, :mod:`.loader` turns the windows of a rank's streams into batches. None of them
but the loader knows how many ranks there are, and none of them talks to another rank.
"""
