from tests.gpu.kit import no_tf32

__all__ = ["no_tf32"]
