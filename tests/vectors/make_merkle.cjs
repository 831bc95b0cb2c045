// Writes merkle.json with OpenZeppelin's own tree, for Python and the contract to agree with.
// Usage: node tests/vectors/make_merkle.cjs MODULES > tests/vectors/merkle.json
// DISTRIBUTOR is where tests/chain/test_merkle_vectors.py deploys, so that the contract can check these leaves.
const { createHash } = require("crypto");
const { keccak256 } = require(process.argv[2] + "/js-sha3");
const { StandardMerkleTree } = require(process.argv[2] + "/@openzeppelin/merkle-tree");

const CHAIN_ID = "31337";
const DISTRIBUTOR = "0x5C1921eF9b20d8EbdBbcc74ED5f1759Ff1Ba9257";
const SIZES = [1, 2, 3, 4, 7, 20];

const id = (text) => "0x" + createHash("sha256").update(text).digest("hex");
const wallet = (text) => id(text).slice(0, 42);
const TAG = "openledger/contributor/1";
const contributorId = (wallet) =>
  "0x" + keccak256(Buffer.from("00000018" + Buffer.from(TAG).toString("hex") + wallet.slice(2), "hex"));
const amount = (i) => (10n ** 9n * (BigInt(i) ** 7n * 12_345n + 1n)).toString();

function entries(tree, show) {
  return [...tree.entries()].map(([i, value]) => ({ ...show(value), leaf: tree.leafHash(value), proof: tree.getProof(i) }));
}

const rewards = SIZES.map((size) => {
  const wallets = Array.from({ length: size }, (_, i) => wallet(`contributor ${size} ${i}`));
  const rows = wallets.map((w, i) => [CHAIN_ID, DISTRIBUTOR, contributorId(w), amount(i)]);
  const walletOf = Object.fromEntries(wallets.map((w) => [contributorId(w), w]));
  const tree = StandardMerkleTree.of(rows, ["uint256", "address", "bytes32", "uint256"]);
  const show = (v) => ({ wallet: walletOf[v[2]], contributorId: v[2], cumulativeWei: v[3] });
  return { root: tree.root, entries: entries(tree, show) };
});
const receipts = SIZES.map((size) => {
  const tree = StandardMerkleTree.of(Array.from({ length: size }, (_, i) => [id(`receipt ${size} ${i}`)]), ["bytes32"]);
  return { root: tree.root, entries: entries(tree, (v) => ({ receiptId: v[0] })) };
});
const source = "npm @openzeppelin/merkle-tree 1.0.8";
console.log(JSON.stringify({ source, chainId: Number(CHAIN_ID), distributor: DISTRIBUTOR, rewards, receipts }, null, 1));
