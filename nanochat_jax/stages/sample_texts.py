"""Short texts of several kinds, written for this project, to measure a tokenizer on."""

NEWS = """\
The city council voted on Tuesday to close the old harbour bridge to lorries from next spring, ending two years of
argument between residents and hauliers. Engineers had warned in March that the steel beneath the northern span, laid
in 1931, would not bear today's traffic for more than another decade. "We are not closing the bridge, we are saving
it," said the mayor, Ellen Vance, who promised that buses and ambulances would still be let across. The repairs are
expected to cost $48.6 million and to last until 2029. Shopkeepers on the south bank fear that customers won't come
back; a survey of 1,200 households found that 37% of them crossed the river at least three times a week. The regional
transport authority will pay half of the bill, and the rest is to be raised through a loan at 4.25%, which the
opposition called "a gift to the banks".
"""

CODE = '''\
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Inventory:
    """What is in stock, by name."""

    items: Counter = field(default_factory=Counter)

    def remove(self, name: str, amount: int = 1) -> None:
        if amount <= 0:
            raise ValueError(f"amount must be positive, got {amount}")
        if self.items[name] < amount:
            raise KeyError(f"only {self.items[name]} of {name!r} left")
        self.items[name] -= amount


static int binary_search(const int *values, int n, int key) {
    int low = 0, high = n - 1;
    while (low <= high) {
        int middle = low + (high - low) / 2;
        if (values[middle] == key) return middle;
        if (values[middle] < key) low = middle + 1; else high = middle - 1;
    }
    return -1;
}
'''

MATHS = r"""\begin{theorem} Let $f : [a, b] \to \mathbb{R}$ be continuous with $f(a) < 0 < f(b)$. Then there is
$c \in (a, b)$ such that $f(c) = 0$. \end{theorem}
\begin{proof} Put $S = \{ x \in [a, b] : f(x) < 0 \}$ and $c = \sup S$. If $f(c) > 0$, then by continuity $f > 0$ on
$(c - \delta, c]$ for some $\delta > 0$, so that $c - \delta$ is an upper bound of $S$, a contradiction. \end{proof}
The sum of the first $n$ odd numbers is $\sum_{k=1}^{n} (2k - 1) = n^2$; for example $1 + 3 + 5 + 7 + 9 = 25$. With
$x = 3.75$ and $y = 12$ we get $\frac{x^2 + y^2}{2} = \frac{14.0625 + 144}{2} = 79.03125$, and
$\int_0^1 e^{-t^2}\,dt \approx 0.746824$.
"""

KOREAN = """\
어제저녁 갑자기 내린 비 때문에 도시 곳곳의 길이 막혔다. 버스를 기다리던 사람들은 가까운 찻집에 들어가
창밖을 바라보며 비가 그치기를 기다렸다. 한 할머니는 손자에게 어릴 적 강가에서 물고기를 잡던 이야기를
들려주었고, 아이는 두 눈을 반짝이며 귀를 기울였다. 밤 아홉 시가 지나서야 비가 멎었고, 젖은 길
위에는 가로등 불빛이 길게 비쳤다.
"""

GERMAN = """\
Am Morgen lag Nebel über dem Fluss, und die Fährleute warteten, bis man das andere Ufer wieder sehen konnte. „Früher“,
sagte der Älteste von ihnen, „hätten wir die Glocke geläutet und wären trotzdem gefahren.“ Heute darf niemand ablegen,
solange die Sichtweite unter zweihundert Metern bleibt; so will es die Schifffahrtsverordnung, und so wird es wohl
auch bleiben.
"""

SAMPLE_TEXTS = {"news": NEWS, "code": CODE, "maths": MATHS, "german": GERMAN, "korean": KOREAN}
