"""What a trained model is good for: text from it, what it predicts of held-out text, with how many experts, in whose format.

Here: finding a run's weights (``find``), drawing text (``generate``), losses with intervals (``evaluate``) at any number of active experts
(``active``), of checkpoints of ``transformers`` too (``stock``), and weights for that library (``to_transformers``). Not here: how a run came to
its weights (``mue.lab.train``), and what several runs say together (``mue.lab.study``).
"""
