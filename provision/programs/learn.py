"""Twenty optimizer steps of something tiny: the environment works, and sees the card if it is called with `gpu`."""

import sys

import torch


def main(kind: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    inputs = torch.randn(64, 8, device=device)
    targets = inputs @ torch.randn(8, 1, device=device)
    layers = torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1)
    model = torch.nn.Sequential(*layers).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], f"the loss does not fall: {losses[0]:.4f} -> {losses[-1]:.4f}"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"torch {torch.__version__} on {name}: loss {losses[0]:.2f} -> {losses[-1]:.2f} in 20 steps")
    assert kind != "gpu" or device == "cuda", "torch does not see the GPU"


if __name__ == "__main__":
    main("".join(sys.argv[1:]))
