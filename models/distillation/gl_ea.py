"""GL-Mixer and Embedding Assistant together: the assistant joins the embedding that the mixer has mixed."""

from models.distillation.embedding_assistant import EmbeddingAssistant
from models.distillation.gl_mixer import GLMixer


class MixerWithAssistant(GLMixer, EmbeddingAssistant):
    """P_i = u_i·PEA_i(GL(E_i)) + v_i·EA_i(F_{i-1}); GL mixes stage 4 alone."""
