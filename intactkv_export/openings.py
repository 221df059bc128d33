"""How documents of many kinds begin: the reference continues them, as a user would paste them into a conversation.

A prefix that is calibrated on them too serves texts better that are no small talk (docs/calibration.md). Written for
this project; nothing of what it is evaluated on (Python's documentation) is among them.
"""

from __future__ import annotations

OPENINGS = [
    # encyclopedia
    "The common kingfisher (Alcedo atthis) is a small bird that",
    "Basalt is a fine-grained volcanic rock formed by",
    "The Hanseatic League was a confederation of merchant guilds and market towns which",
    "Photosynthesis is the process by which",
    "In music theory, a cadence is",
    "The river rises in the eastern highlands at an elevation of 1,840 metres and flows",
    "Maria Teresa Alvarado (born 14 March 1931) was a chemist who",
    "Lighthouses: history and construction\n\nThe earliest lighthouses were",
    "A suspension bridge is a type of bridge in which",
    "The digestive system of ruminants consists of",
    # story
    "The old clockmaker had not opened his shop for three weeks when",
    "Nobody in the village believed that the well could speak, until",
    "\"You are late,\" said the woman at the gate, without turning around.",
    "Chapter 1\n\nIt was raining on the morning the circus came to",
    "Once, in a kingdom where it never snowed, there lived a girl who",
    "Captain Ruiz counted the stars again. There was one too many.",
    "My grandmother kept a locked box under her bed, and the year I turned twelve",
    "The dog waited at the station every evening. On the last day of October",
    # manual
    "Installation\n\n1. Remove the transport bolts at the back of the washing machine.\n2.",
    "Before first use, rinse the water tank and fill it to the mark. Then",
    "WARNING: Disconnect the power supply before opening the cover. To replace the filter,",
    "How to prune an apple tree\n\nStart in late winter, when",
    "Section 4.2 Calibration of the pressure sensor\n\nThe sensor must be",
    "Troubleshooting\n\nThe pump does not start: check that",
    "To assemble the bookshelf you need two people, a screwdriver and",
    "The camera has three shooting modes. In automatic mode,",
    # letter, mail
    "Dear Mrs. Okafor,\n\nThank you for your letter of 3 June. I am writing to",
    "Dear Tom,\n\nYou will not believe what happened on our second day in Lisbon.",
    "Hi all,\n\nA quick update on the migration: last night we",
    "To whom it may concern,\n\nI have known Daniel Weber for six years, as his",
    "Dear Editor,\n\nYour article on the closing of the public swimming pool",
    "Subject: Complaint about order 48213\n\nHello,\n\non Monday I received",
    # news
    "GENEVA - Negotiators reached a provisional agreement on Thursday that",
    "The city council voted 7 to 4 on Tuesday night to",
    "Shares of the shipping company fell 12 percent after",
    "Firefighters spent the night battling a blaze that",
    "Researchers have found evidence that the glacier",
    "After a goalless first half, the home side",
    "The ministry announced new rules for electric scooters, which",
    # code and comments
    "/* Ring buffer for the serial port. Interrupts write at head, the main loop reads at tail.",
    "// Returns the shortest path between two nodes, or an empty list if",
    "#!/bin/sh\n# Back up the database every night and keep the last seven copies.\n",
    "-- Monthly revenue by region, with the change against the month before\nSELECT",
    "function debounce(callback, delay) {\n  // Each call restarts the timer, so",
    "# Changelog\n\n## 2.4.0\n\n- Added:",
    "<!-- The navigation bar. It collapses below 600 pixels. -->\n<nav class=\"top\">",
    "package queue\n\n// Queue is a first-in first-out queue that is safe for",
    "The configuration file has one section for each server. The key `timeout`",
    # textbook, science
    "Theorem 3. Let f be continuous on a closed interval. Then",
    "Abstract. We study the growth of tomato plants under",
    "Exercise 7. A block of mass 2 kg slides down an incline of 30 degrees. Find",
    "Methods. Forty-two volunteers were divided at random into",
    "The word \"salary\" goes back to Latin. In the course of centuries",
    "In economics, the price elasticity of demand measures",
    "Table 2 lists the melting points of five metals. Copper,",
    # law, business, minutes
    "Article 5. The tenant shall",
    "This agreement is made between the supplier and the customer. The following terms",
    "Minutes of the meeting of 12 May\n\nPresent: Lindqvist, Harper, Sato. Absent:",
    "Quarterly report\n\nRevenue rose by 8 percent compared with",
    "Privacy notice\n\nWe collect only the data that",
    # essays, opinion, reviews
    "There are two kinds of cooks: those who measure and those who",
    "The film begins well enough. A young doctor",
    "It is often said that cities never sleep, but",
    "I bought these boots in autumn and have walked about 300 km in them.",
    "Why do we remember some conversations for decades and",
    # recipes, travel, lists, speech, verse
    "Lentil soup\n\nIngredients:\n- 250 g red lentils\n-",
    "The ferry to the island leaves at seven in the morning. From the harbour",
    "Ladies and gentlemen, it is an honour to",
    "The moon above the harbour wall\n",
    "Ten facts about the deep sea:\n\n1.",
    "INTERVIEWER: When did you first know that you wanted to build instruments?\n\n",
    "Monday, 4 February. Snow again. We have",
    "Q: Can I use the card abroad?\nA:",
    "Le marché ouvre à huit heures. Les premiers clients",
    "Der Wanderweg beginnt am Parkplatz hinter der Kirche und",
    "El zorro y la cigüeña vivían",
    "Name: Ana Petrov\nPosition applied for: laboratory technician\nExperience:",
]
