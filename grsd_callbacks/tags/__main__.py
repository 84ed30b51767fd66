"""`python -m grsd_callbacks.tags` prints the table of all tags."""

from grsd_callbacks.tags.cards import meaning_card

print(meaning_card())
