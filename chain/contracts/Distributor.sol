// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {AccessControl} from "@openzeppelin/contracts/access/AccessControl.sol";
import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";

import {IAttributionLedger} from "./IAttributionLedger.sol";
import {IContributorRegistry} from "./IContributorRegistry.sol";
import {Claim, IDistributor, Period} from "./IDistributor.sol";

contract Distributor is IDistributor, AccessControl {
    using SafeERC20 for IERC20;
    using SafeCast for uint256;

    bytes32 public constant SETTLER = keccak256("SETTLER");
    bytes32 public constant GUARDIAN = keccak256("GUARDIAN");

    /// @dev Two slots, since every claim reads them: 2^96 wei are 79 billion tokens, 2^48 seconds 9 million years.
    struct Posted {
        bytes32 root;
        uint96 totalWei;
        uint64 lastBatch;
        uint48 activeAt;
        uint48 periodId;
    }

    IERC20 public immutable token;
    IContributorRegistry public immutable registry;
    IAttributionLedger public immutable ledger;
    uint64 public immutable activationDelay;

    mapping(bytes32 contributorId => uint256) public claimedWei;
    uint256 public totalClaimedWei;

    Posted private _earlier; // active, until _latest is
    Posted private _latest; // pending or active; erased when disabled

    constructor(
        IERC20 token_,
        IContributorRegistry registry_,
        IAttributionLedger ledger_,
        uint64 activationDelay_,
        address admin,
        address settler,
        address guardian
    ) {
        token = token_;
        registry = registry_;
        ledger = ledger_;
        activationDelay = activationDelay_;
        _grantRole(DEFAULT_ADMIN_ROLE, admin);
        _grantRole(SETTLER, settler);
        _grantRole(GUARDIAN, guardian);
    }

    function postPeriod(Period calldata period, bytes calldata daCommitment) external onlyRole(SETTLER) {
        if (_isPending()) revert PreviousPeriodPending(_latest.periodId, _latest.activeAt, block.timestamp);
        Posted memory active = _active();
        _check(period, active);
        uint48 activeAt = (block.timestamp + activationDelay).toUint48();
        _earlier = active;
        _latest = Posted(
            period.root, period.totalWei.toUint96(), period.lastBatch, activeAt, uint256(period.periodId).toUint48()
        );
        emit PeriodPosted(
            period.periodId,
            period.root,
            period.payloadHash,
            period.totalWei,
            period.firstBatch,
            period.lastBatch,
            period.ledgerHead,
            activeAt,
            daCommitment
        );
    }

    function disable(uint64 periodId) external onlyRole(GUARDIAN) {
        if (!_isPending() || periodId != _latest.periodId) revert NotPending(periodId);
        emit PeriodDisabled(periodId, _latest.root, msg.sender);
        delete _latest;
    }

    function claim(bytes32 contributorId, uint256 cumulativeWei, bytes32[] calldata proof) external {
        Posted memory active = _active();
        if (_claim(active, contributorId, cumulativeWei, proof) == 0) {
            revert NothingToClaim(contributorId, cumulativeWei, claimedWei[contributorId]);
        }
    }

    function claimMany(Claim[] calldata claims) external {
        Posted memory active = _active();
        for (uint256 i; i < claims.length; ++i) {
            _claim(active, claims[i].contributorId, claims[i].cumulativeWei, claims[i].proof);
        }
    }

    function fundedWei() public view returns (uint256) {
        return token.balanceOf(address(this)) + totalClaimedWei;
    }

    function activePeriod() external view returns (uint64, bytes32, uint256, uint64) {
        Posted memory active = _active();
        return (active.periodId, active.root, active.totalWei, active.lastBatch);
    }

    function pendingPeriod() external view returns (uint64, bytes32, uint256, uint64, uint64) {
        if (!_isPending()) return (0, 0, 0, 0, 0);
        return (_latest.periodId, _latest.root, _latest.totalWei, _latest.lastBatch, _latest.activeAt);
    }

    function _check(Period calldata period, Posted memory active) private view {
        if (period.periodId != active.periodId + 1) revert UnexpectedPeriod(active.periodId + 1, period.periodId);
        if (period.firstBatch != active.lastBatch + 1 || period.lastBatch < period.firstBatch) {
            revert BatchesNotContiguous(active.lastBatch + 1, period.firstBatch, period.lastBatch);
        }
        bytes32 settledHead = ledger.headOf(period.lastBatch);
        if (settledHead == 0 || settledHead != period.ledgerHead) {
            revert HeadMismatch(period.lastBatch, settledHead, period.ledgerHead);
        }
        if (period.totalWei % 1 gwei != 0) revert NotWholeGwei(period.totalWei);
        if (period.totalWei < active.totalWei) revert TotalBelowPrevious(period.totalWei, active.totalWei);
        if (period.totalWei > fundedWei()) revert NotFunded(period.totalWei, fundedWei());
    }

    /// @return paidWei 0 if everything up to `cumulativeWei` was paid before
    function _claim(Posted memory active, bytes32 contributorId, uint256 cumulativeWei, bytes32[] calldata proof)
        private
        returns (uint256 paidWei)
    {
        if (active.periodId == 0) revert NoActivePeriod();
        bytes32 leaf = keccak256(
            bytes.concat(keccak256(abi.encode(block.chainid, address(this), contributorId, cumulativeWei)))
        );
        if (!MerkleProof.verifyCalldata(proof, active.root, leaf)) revert BadProof(contributorId, cumulativeWei);
        uint256 before = claimedWei[contributorId];
        if (cumulativeWei <= before) return 0;
        address wallet = registry.walletOf(contributorId);
        if (wallet == address(0)) revert NotRegistered(contributorId);
        paidWei = cumulativeWei - before;
        uint256 total = totalClaimedWei + paidWei;
        if (total > active.totalWei) revert TotalExceeded(total, active.totalWei);
        claimedWei[contributorId] = cumulativeWei;
        totalClaimedWei = total;
        emit Claimed(contributorId, wallet, paidWei, cumulativeWei);
        token.safeTransfer(wallet, paidWei);
    }

    function _isPending() private view returns (bool) {
        return _latest.periodId != 0 && block.timestamp < _latest.activeAt;
    }

    function _active() private view returns (Posted memory) {
        return _latest.periodId != 0 && block.timestamp >= _latest.activeAt ? _latest : _earlier;
    }
}
