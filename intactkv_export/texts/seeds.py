"""What texts of the reference's own grow from: questions, follow-ups, and beginnings of documents that it continues.

A wide spread on purpose, because a prefix is calibrated on what grows from them: domains, lengths, registers, formats
asked for, languages, texts to work on, code, small talk; and documents, as users paste them, which make the prefix
serve texts better that are no small talk (docs/concepts/calibration.md). Written for this project; nothing of what it
is evaluated on (Python's documentation) is among them.
"""

from __future__ import annotations

# First messages of a user.
QUESTIONS = [
    # science and mathematics
    "Why is the sky blue at noon and red in the evening?",
    "Explain how vaccines train the immune system, for a ten-year-old.",
    "What would happen to the tides if the Moon were twice as far away?",
    "Describe the path of a drop of water from the ocean to a mountain lake and back.",
    "What is the difference between speed and velocity? Give two examples from daily life.",
    "How do bees tell each other where the flowers are?",
    "Prove that the square root of 2 is irrational.",
    "A train leaves at 9:15 and travels 210 km at 84 km/h. When does it arrive? Show every step.",
    "Solve 3x + 7 = 2(x - 4) + 21 and check the result.",
    "I flip a fair coin ten times and get ten heads. What is the probability of heads on the next flip, and why do "
    "people get this wrong?",
    "Explain the central limit theorem in plain words, then state it with symbols.",
    "What is entropy? I have read five definitions and they all seem to talk about different things.",
    "Summarize what we know about dark matter in three sentences.",
    "How does a nuclear power plant turn heat into electricity? Number the steps.",
    "Which planets have rings? Answer with a table: planet, ring material, year of discovery.",
    # computing
    "Write a Python function that returns the n-th Fibonacci number without recursion.",
    "What does this do?\n\n```c\nwhile (*d++ = *s++);\n```",
    "Write a SQL query that finds customers without an order in the last 90 days. Tables: customers(id, name), "
    "orders(id, customer_id, created_at).",
    "Explain the difference between a process and a thread to someone who knows how to cook but not how to program.",
    "My web page loads slowly. Give me a checklist of the ten most likely causes, the most likely first.",
    "Write a regular expression for dates such as 2024-02-29 and explain each part of it.",
    "Review this code and suggest improvements:\n\ndef avg(l):\n    s = 0\n    for i in range(0, len(l)):\n"
    "        s = s + l[i]\n    return s / len(l)",
    "Give me a JSON object that describes a book with title, author, year and a list of three tags.",
    "How do I undo the last commit in git without losing my changes?",
    "What is a hash table, when is it slow, and what do people use instead?",
    "Write a shell script that renames all .jpeg files in a folder to .jpg.",
    "Implement a stack in Rust with push, pop and peek.",
    "Translate this into JavaScript: `squares = [x * x for x in range(10) if x % 2]`",
    "Write unit tests for a function slugify(title) that makes titles fit for a URL.",
    "Generate an HTML page with a heading, a paragraph, and a form that asks for name and e-mail address.",
    "Convert this to CSV:\nAnna is 31 and lives in Graz. Tom, 27, lives in Linz. Eva lives in Wels and is 45.",
    # history, society, law, economics
    "What caused the fall of the Western Roman Empire? Give the three explanations historians argue about most.",
    "Write a timeline of the Apollo program.",
    "Who was Ada Lovelace?",
    "How did the printing press change Europe in its first hundred years?",
    "Compare the Athenian assembly with a modern parliament.",
    "What is the difference between a civil and a criminal case? I was asked to be a witness and I am nervous.",
    "Explain inflation using the price of bread.",
    "My landlord keeps the deposit although I left the flat clean. What can I do, in general?",
    "List arguments for and against a four-day working week, as a table with two columns.",
    "How is a law made? Keep it general, no particular country.",
    "What is opportunity cost? One paragraph, one example.",
    "Why do some countries drive on the left?",
    # health, home, food, travel, sport
    "I sleep badly. Ask me five questions that would help to find out why.",
    "Recipe for a lentil soup for four people, please. Metric units.",
    "I have eggs, rice, one onion and soy sauce. What can I cook in twenty minutes?",
    "How do I get red wine out of a white tablecloth?",
    "Make a training plan for someone who wants to run 10 km in twelve weeks. One line a week.",
    "My houseplant has yellow leaves with brown tips. What is wrong with it?",
    "Plan a three-day trip to Lisbon for a family with two small children. They hate museums.",
    "What should be in a first-aid kit for hiking?",
    "How does the offside rule work?",
    "How often should I change the oil in my car, and can I do it myself?",
    "Suggest a vegetarian menu with starter, main course and dessert, and the shopping list for it.",
    "My neighbour plays the drums at night. How do I talk to her without making an enemy?",
    "Explain how to change a bicycle tube. I have two tyre levers and a pump and no idea.",
    # letters and other texts to write
    "Write a letter to my landlord: the heating has been broken for a week, it is January, I have a baby.",
    "Write a short, polite e-mail that declines a meeting and proposes next Tuesday instead.",
    "Write a cover letter for a job as a gardener. I have no training but ten years of experience.",
    "Write a toast for my grandmother's 90th birthday. She was a postwoman and she hates long speeches.",
    "Write a product description for a wooden chair, 60 words, no exclamation marks.",
    "Write the opening of a detective story that takes place in a lighthouse.",
    "Write a poem about an old computer, four stanzas, rhymed.",
    "Write a haiku about rain. Then another one, about the same rain, seen by a cat.",
    "Tell me a bedtime story about a snail who wants to see the sea.",
    "Write a dialogue between a river and a bridge.",
    "Write a limerick about a man from Peru.",
    "Write a complaint to an airline whose staff lost my cello. Firm, but not rude.",
    "Draft a press release: a small town opens a library in a former swimming pool.",
    "Write a speech of one minute against the closing of our village school.",
    "Give me ten names for a café that also repairs bicycles.",
    "Write a dialogue in a shop. The customer wants to return a parrot.",
    # texts to work on
    "Summarize this in one sentence:\n\nThe committee met three times in March. At the first meeting it elected a "
    "chair, at the second it agreed on a budget of 40,000, and at the third, after a long discussion, it decided to "
    "postpone the construction of the new playground until the soil had been examined, because residents remembered "
    "that a dry cleaner had stood there until 1987.",
    "Rewrite this so that it sounds friendly:\n\nYour application is incomplete. Send the missing documents by "
    "Friday or it will be rejected.",
    "Correct the mistakes in this text: \"Me and him was going too the store yesterday, but they was closed. Its a "
    "shame becuase I realy needed bred.\"",
    "Turn these notes into a paragraph: - founded 1921 - three looms, five workers - burned down 1934 - rebuilt with "
    "money of the whole village - today 60 workers, exports to Japan",
    "Extract all names, dates and amounts as a bulleted list:\n\nOn 4 May 2011 Ms Okafor lent Mr Brandt 1,200 euros. "
    "He returned 700 on 30 June, and the rest, with 35 of interest, on 2 January 2012, in the presence of Dr. Liu.",
    "Simplify this for a reader who is learning English:\n\nNotwithstanding the foregoing, the lessee shall be "
    "entitled to terminate this agreement upon thirty days' written notice, provided that all outstanding sums have "
    "been remitted in full.",
    "What is the mood of this text, and which words create it?\n\nThe house had been empty for years. Dust lay on the "
    "piano like snow, and somewhere above, a shutter knocked, and knocked, and would not be answered.",
    "Continue this story: When the last ferry had gone, Mira noticed that the suitcase in her hand was not hers.",
    "Give this article a title and three subheadings:\n\nCities are hotter than the land around them. Stone and "
    "asphalt store heat during the day and give it back at night. Trees cool the air, but they need water and room "
    "for their roots. Some cities now paint roofs white. Others dig up car parks. What helps most depends on wind, on "
    "the age of the buildings, and on who pays.",
    "Is this review positive, negative or mixed? Answer with one word, then explain.\n\n\"The food was wonderful. We "
    "waited ninety minutes for it, and the waiter laughed at my French. I will probably come back.\"",
    "Put the following into a table: The Nile is 6650 km long and ends in the Mediterranean, the Amazon 6400 km, "
    "Atlantic, the Yangtze 6300 km, East China Sea.",
    "Explain the joke: I told my plants a joke about roots. They did not get it, but it grew on them.",
    # languages
    "Translate into French: The train was late again, so we missed the beginning of the concert.",
    "Übersetze ins Englische: Wer anderen eine Grube gräbt, fällt selbst hinein. Was bedeutet das?",
    "Was ist der Unterschied zwischen Wetter und Klima? Antworte auf Deutsch in drei Sätzen.",
    "¿Qué puedo visitar en Sevilla en dos días? Responde en español.",
    "Explique-moi la photosynthèse comme si j'avais huit ans.",
    "Qual è la capitale d'Italia, e quale lo era prima di Roma?",
    "Escreva uma mensagem de aniversário para um colega de trabalho.",
    "请用三句话介绍长城。",
    "日本の四季について短く説明してください。",
    "Напиши короткое письмо другу о поездке на море.",
    "Wat is het verschil tussen 'ook' en 'toch' in het Nederlands?",
    "Give me the days of the week in Spanish, German and Swedish, as a table.",
    # opinion, reasoning, planning, small talk
    "Hi! How are you today?",
    "hey can u help me w something real quick",
    "I am bored. Entertain me.",
    "Who are you, and what can you not do?",
    "I failed my driving test for the third time and I feel stupid.",
    "What should I think about before I adopt a dog?",
    "Cats or dogs? You have to choose.",
    "Three boxes: one holds gold, each has a label, exactly one label is true. A: \"The gold is here.\" "
    "B: \"The gold is not here.\" C: \"The gold is not in A.\" Where is the gold?",
    "If all bloops are razzies and some razzies are lazzies, are some bloops certainly lazzies?",
    "Give me pros and cons of renting against buying a home, then your recommendation for someone who moves every "
    "three years.",
    "How do I become better at saying no?",
    "Help me plan a birthday party for twelve children with a budget of 100 euros.",
    "Define 'freedom' in exactly one sentence. Then criticize your definition.",
    "What are good questions to ask at the end of a job interview?",
    "Teach me something surprising. Anything.",
    "Write step-by-step instructions for making tea, as if for a robot that takes everything literally.",
    "Thanks for yesterday, by the way!",
    "?",
]  # fmt: skip

# Messages that keep a conversation going.
FOLLOW_UPS = [
    "Can you explain that in more detail?",
    "Make it shorter.",
    "Thanks! Give me an example.",
    "Why?",
    "Are you sure? Check it again.",
    "Now say the same as a bulleted list.",
    "What would an expert object to?",
    "Rewrite your answer for a child.",
    "And what happens next?",
    "Could you put that into a table?",
    "Translate your answer into German.",
    "What should I do first?",
    "I do not understand the last part.",
    "Give me three alternatives.",
    "Summarize our conversation so far.",
    "ok, go on",
]

# How documents of many kinds begin.
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
    '"You are late," said the woman at the gate, without turning around.',
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
    '<!-- The navigation bar. It collapses below 600 pixels. -->\n<nav class="top">',
    "package queue\n\n// Queue is a first-in first-out queue that is safe for",
    "The configuration file has one section for each server. The key `timeout`",
    # textbook, science
    "Theorem 3. Let f be continuous on a closed interval. Then",
    "Abstract. We study the growth of tomato plants under",
    "Exercise 7. A block of mass 2 kg slides down an incline of 30 degrees. Find",
    "Methods. Forty-two volunteers were divided at random into",
    'The word "salary" goes back to Latin. In the course of centuries',
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
