// Sorts a table by the column whose head is pressed, by pointer or by keyboard; pressed
// again, the other way round. Cells without a number go last either way.
for (const button of document.querySelectorAll('thead button')) {
  button.addEventListener('click', () => {
    const head = button.parentElement;
    const body = head.closest('table').tBodies[0];
    const column = head.cellIndex;
    const cells = new Map([...body.rows].map((row) => [row, row.cells[column]]));
    const numbers = [...cells.values()].some((cell) => 'value' in cell.dataset);
    const first = numbers ? 'descending' : 'ascending';
    const second = numbers ? 'ascending' : 'descending';
    const order = head.getAttribute('aria-sort') === first ? second : first;
    for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', order);
    const sign = order === 'ascending' ? 1 : -1;
    const value = (row) => ('value' in cells.get(row).dataset ? +cells.get(row).dataset.value : null);
    const compare = (a, b) => {
      if (!numbers) {
        const texts = [a, b].map((row) => cells.get(row).textContent);
        return sign * texts[0].localeCompare(texts[1], 'en', { numeric: true });
      }
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * (x - y);
    };
    body.append(...[...body.rows].sort(compare));
  });
}
