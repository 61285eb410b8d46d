"""The wording of every prompt. Templates are ours; a user may add to any list.

Fields: ``{history}`` semantic IDs of past items, oldest first; ``{titles}`` their titles; ``{sid}`` one semantic ID;
``{text}`` what is known of one item; ``{query}`` what the user looks for; ``{preference}`` what the user likes.
Those that ask for the next item by its semantic ID stand in ``gream_verl.core.prompts``.
"""

from __future__ import annotations

ITEM_TO_INDEX = (
    "Which item is this? {text}",
    "Give the semantic ID of: {text}",
    "{text} Item?",
    "Find the identifier for {text}",
    "Item with this text: {text}",
    "Map to an item: {text}",
    "What is the ID of {text}?",
    "The catalogue lists {text} Under which ID?",
    "Name the item described as {text}",
    "Look up {text}",
    "Encode this item: {text}",
    "I mean {text} Which one is it?",
    "Text: {text} ID:",
    "Identify {text}",
    "Which semantic ID stands for {text}?",
    "Match this text to its item: {text}",
    "Write the ID that belongs to {text}",
    "An item reads: {text} Its ID?",
    "Point to the item called or described so: {text}",
)

INDEX_TO_ITEM = {
    "title": (
        "What is the title of {sid}?",
        "{sid} Title?",
        "Name the item {sid}",
        "Which title belongs to {sid}?",
        "Decode {sid} to its title.",
        "Write out the title of item {sid}",
        "How is {sid} called?",
        "Give the name behind {sid}",
        "Title of {sid}:",
    ),
    "description": (
        "Describe {sid}",
        "What is known of {sid}?",
        "{sid} Description?",
        "Give the description of item {sid}",
        "What would the catalogue say about {sid}?",
        "Explain what {sid} is.",
        "Describe the item with the ID {sid}",
        "Details of {sid}:",
    ),
}

FUSION = {
    "title": (
        "History: {history} Title of the next item?",
        "{history} What is the title of the item that follows?",
        "Name by its title what comes after {history}",
        "After {history} the user picks an item called?",
    ),
    "description": (
        "History: {history} Describe the next item.",
        "{history} What will the next item be like?",
        "Describe what the user takes after {history}",
        "Which features has the item that follows {history}?",
    ),
    "sid": (
        "The user had: {titles}. Next item?",
        "Titles so far: {titles}. Which item follows?",
        "After {titles}, give the next item.",
        "{titles}. Continue with one item.",
    ),
}

ITEM_SEARCH = {
    "query": (
        "Search: {query}",
        "Find an item for: {query}",
        "The user looks for {query}. Which item?",
        "Query: {query} Result?",
        "Show one item that fits {query}.",
    ),
    "history": (
        "History: {history} The user now looks for {query}. Which item?",
        "{history} Search: {query}",
        "Find for this user, {history} an item with {query}.",
        "Past items {history} and the query {query}. Result?",
        "The user likes {preference}, had {history} and asks for {query}. Item?",
        "Knowing {history} answer the search {query}.",
    ),
}

PREFERENCE = (
    "History: {history} What does the user like?",
    "{history} Preference?",
    "Sum up the taste behind {history}",
    "What kinds of items does the owner of {history} prefer?",
    "Infer the preference from {history}",
    "Read {history} and state what the user is drawn to.",
    "Which themes run through {history}?",
    "Describe the user who chose {history}",
    "Taste profile of {history}:",
    "What do {history} have in common for this user?",
    "From {history} derive the user's likes.",
)

FEATURES = {
    "features": (
        "Features of {sid}?",
        "{sid} Which categories?",
        "List what kind of item {sid} is.",
        "Name the attributes of {sid}",
        "What type is {sid}?",
    ),
    "sid": (
        "An item with these features: {text}",
        "Features: {text} Item?",
        "Which item has {text}?",
        "Give an item of the kind {text}.",
        "Attributes {text}. Which ID?",
    ),
}

RECONSTRUCTION = {
    "titles": (
        "Write the titles of {history}",
        "{history} Titles?",
        "Decode this history: {history}",
        "Spell out {history} item by item.",
        "Which titles are {history}?",
        "Turn {history} to text.",
        "Name every item in {history}",
        "Title list for {history}:",
    ),
    "sids": (
        "Write the IDs of: {titles}.",
        "{titles}. IDs?",
        "Encode this history: {titles}.",
        "Turn these titles to items: {titles}.",
        "Which items are {titles}?",
        "Give one ID for each of {titles}.",
        "ID list for {titles}:",
    ),
}
