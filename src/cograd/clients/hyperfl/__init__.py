"""HyperFL (arXiv 2412.07187): clients share a hypernetwork, and keep what makes it generate their model.

A client's model is an extractor and a classifier. The extractor's weights are not trained: a *hypernetwork*
generates them from an *embedding*, theta_i = h(v_i; Phi). Shared between clients and server is Phi alone, with
the clients' m_i examples as weights; the embedding v_i, the extractor theta_i and the classifier phi_i stay
where they are. In round t each participant

    Phi_i <- Phi^t
    phase 1, some epochs:  phi_i        <- SGD on the loss, theta_i fixed
    phase 2, some epochs:  Phi_i, v_i   <- SGD on the loss, phi_i fixed; theta_i = h(v_i; Phi_i) at every step
    server:                Phi^{t+1} = sum_i m_i Phi_i / sum_i m_i

The gradients of Phi and of v_i are clipped, each by itself. HyperFL-LPM is the same where theta_i are the
weights of adapters in a frozen backbone.

The paper argues that gradients of Phi do not reveal the examples as gradients of theta_i would. They do: the
bias of a head is c_k, and its gradient *is* the gradient of theta_i. `leak` recovers both from one message.
What remains hidden is the classifier. What HyperFL buys is personalisation, for H + 1 times FedAvg's bytes.

- `hypernet`: the hypernetwork, its gradient in closed form, its size;
- `method`: the rounds;
- `adapters`: adapters for frozen backbones of the ViT and ResNet kind;
- `leak`: what a message gives away.

Where this differs from the released code: each client draws its own embedding (there all are copies of one, so
that the server knows them); theta is generated anew wherever Phi or v has changed (there the model that is
tested is one aggregation old); adapters that are named are found, or refused (there ResNet's are never loaded).
"""

from cograd.clients.hyperfl.adapters import BlockAdapter, StageAdapter, adapt, block_adapters, stage_adapters
from cograd.clients.hyperfl.hypernet import HyperNet
from cograd.clients.hyperfl.leak import Leak, directions, first_input, leak
from cograd.clients.hyperfl.method import HyperFL

__all__ = [
    "BlockAdapter",
    "HyperFL",
    "HyperNet",
    "Leak",
    "StageAdapter",
    "adapt",
    "block_adapters",
    "directions",
    "first_input",
    "leak",
    "stage_adapters",
]
