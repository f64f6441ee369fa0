"""Built-in texts for models that are looked at without one."""

# In the register of the plays on which the shipped model is trained; written for this package.
PLAY = (
    """\
LADY MARGERY:
Good morrow, cousin. Hast thou brought the letter
That my lord Edmund promised me last night?

SERVANT:
I have, good lady. Here it is, and sealed;
But he that gave it wept to see it go.

LADY MARGERY:
He wept? Then read it to me, gentle friend,
For I do fear the letter more than death.
""",
    """\
FIRST GUARD:
Who goes there? Stand, and speak thy name, I say.

SECOND GUARD:
A friend to thee, and to the king a friend.

FIRST GUARD:
The king is dead, and all his friends are fled.

SECOND GUARD:
Then am I no man's friend, and must be gone.
""",
    """\
DUKE:
What news from Florence? Is the war at end?

MESSENGER:
My gracious lord, the war is done and won;
And yet your son, that fought so well in it,
Lies wounded in the house of old Antonio.

DUKE:
My son! O bring me to my son, good man,
And I will give thee gold for every mile.
""",
    """\
CLOWN:
Sir, I have a mother, and my mother hath a mind,
and in her mind there is no room for thee.

MASTER:
Thou art a fool, and so thy mother is.

CLOWN:
Nay, sir, she is no fool; she had but one,
and she hath sent him here to be thy man.
""",
    """\
QUEEN:
Come, night, and cover what the day hath seen:
My father's crown upon another's head,
My brother's blood upon my husband's hand.
O heavy crown! O cruel, cruel hand!
I loved the one, and yet I wear the other.
""",
    """\
ROWLAND:
I pray thee, tell my father I am come.

PORTER:
Thy father, sir? Thy father bids me say
He hath no son; and if he had a son,
That son were gone to sea these seven years.

ROWLAND:
Then tell him that the sea hath sent me home.
""",
)

# Plain English for any other model; written for this package.
PLAIN = (
    """\
The harbour was quiet when Anna came down to the boats. Her brother had left the nets on the
stones to dry, and the nets smelled of salt and of fish. She lifted the first net, then the
second, and carried them to the small boat with the green sail.""",
    """\
In the morning the baker opens the door and sets the bread on the shelf. In the evening he
closes the door and counts the loaves that nobody bought. What is left he gives to the
children of the street, and the children know it.""",
    """\
A clock has two hands. The short hand shows the hours and the long hand shows the minutes.
When the long hand has gone round once, the short hand has moved from one hour to the next,
and the clock strikes.""",
    """\
Doctor Moreno looked at the map again. The river on the map ran to the east, but the river
before her ran to the west. Either the map was wrong, said Doctor Moreno, or she had walked
around the hill in the night.""",
)
