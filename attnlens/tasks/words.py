"""The words and sentences that the text tasks are written with."""

from __future__ import annotations

NAMES = (
    "Ann", "Ben", "Tom", "Mary", "John", "Kate", "Sam", "Lucy", "Paul", "Jane", "Mark", "Emma",
    "Luke", "Rose", "Jack", "Lily", "Adam", "Ruth", "Max", "Sara", "Leo", "Amy", "Peter", "Anna",
)  # fmt: skip
PLACES = (
    "park", "house", "garden", "market", "river", "school", "church", "farm", "tower", "shop",
    "beach", "forest",
)  # fmt: skip
OBJECTS = (
    "book", "ring", "cup", "letter", "ball", "flower", "key", "map", "hat", "coin", "bell", "rose",
)  # fmt: skip
KEYS = (
    "fox", "oak", "sun", "lake", "bird", "horse", "king", "boat", "tree", "dog", "lion", "moon",
    "star", "hill", "wolf", "bear", "fish", "door", "road", "child", "ship", "cat", "field", "sea",
)  # fmt: skip
VALUES = (
    "gold", "red", "old", "cold", "green", "tall", "dark", "sweet", "blue", "white", "young",
    "slow", "small", "warm", "black", "soft", "proud", "brave", "big", "kind", "new", "poor",
    "sad", "happy",
)  # fmt: skip

FILLER = (
    "The morning was still and the road was empty.",
    "A man stood by the gate and looked at the sky.",
    "Nobody spoke for a long time.",
    "The wind came from the north and shook the leaves.",
    "She closed the window and sat down again.",
    "There was bread on the table and water in the jar.",
    "The children ran down to the river before noon.",
    "An old woman sold apples at the corner.",
    "It rained in the night, and the grass was wet.",
    "He read the same page over and over.",
    "The bells rang, and the people came out of the church.",
    "They walked home slowly by the light of the moon.",
    "The fire had gone out some hours before.",
    "No one knew how long the journey would take.",
    "The ship lay in the harbour with her sails down.",
    "Somebody had left a coat on the chair.",
    "The market was full of noise and colour.",
    "He thought of his brother and said nothing.",
    "The hill was steep, but the view was worth it.",
    "A dog slept in the shade of the wall.",
    "In the evening they lit the lamps and sang.",
    "The letter came late and was soon forgotten.",
    "She had seen the town only once before.",
    "The horses were tired and would not go on.",
)
