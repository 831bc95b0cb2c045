// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {SignatureChecker} from "@openzeppelin/contracts/utils/cryptography/SignatureChecker.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";

import {Capture, IEscrow, PayerState, SpendCeiling} from "./IEscrow.sol";

contract Escrow is IEscrow, EIP712 {
    using SafeERC20 for IERC20;
    using SafeCast for uint256;

    bytes32 private constant CEILING_TYPEHASH =
        keccak256("SpendCeiling(address payer,address operator,uint256 cumulativeMaxWei,uint64 expiry)");

    IERC20 public immutable token;
    address public immutable ledger;
    address public immutable distributor;
    uint64 public immutable withdrawalDelay;

    mapping(address payer => PayerState) private _payers;

    constructor(IERC20 token_, address ledger_, address distributor_, uint64 withdrawalDelay_)
        EIP712("OpenLedger Escrow", "1")
    {
        token = token_;
        ledger = ledger_;
        distributor = distributor_;
        withdrawalDelay = withdrawalDelay_;
    }

    function deposit(address payer, uint256 amountWei) external {
        _deposit(payer, msg.sender, amountWei);
    }

    function depositWithPermit(address payer, uint256 amountWei, uint256 deadline, uint8 v, bytes32 r, bytes32 s)
        external
    {
        IERC20Permit(address(token)).permit(payer, address(this), amountWei, deadline, v, r, s);
        _deposit(payer, payer, amountWei);
    }

    function authorize(SpendCeiling calldata ceiling, bytes calldata signature) external {
        (uint256 maxWei, uint64 expiry) = (ceiling.cumulativeMaxWei, ceiling.expiry);
        PayerState storage payer = _payers[ceiling.payer];
        if (ceiling.operator != ledger) revert NotTheLedger(ledger, ceiling.operator);
        if (!_isSigned(ceiling.payer, ceilingDigest(ceiling), signature)) revert BadSignature(ceiling.payer);
        if (maxWei == payer.ceilingWei && expiry == payer.expiry) return;
        if (expiry < block.timestamp) revert CeilingExpired(ceiling.payer, expiry, block.timestamp);
        if (maxWei < payer.ceilingWei || expiry < payer.expiry) {
            revert CeilingLowered(ceiling.payer, payer.ceilingWei, payer.expiry, maxWei, expiry);
        }
        payer.ceilingWei = maxWei.toUint128();
        payer.expiry = expiry;
        emit CeilingAuthorized(ceiling.payer, ceiling.operator, maxWei, expiry);
    }

    function capture(uint64 batchId, Capture[] calldata captures) external returns (uint256 totalWei) {
        if (msg.sender != ledger) revert NotTheLedger(ledger, msg.sender);
        address previous;
        for (uint256 i; i < captures.length; ++i) {
            address payer = captures[i].payer;
            if (payer <= previous) revert CapturesNotSorted(previous, payer);
            totalWei += _capture(batchId, payer, captures[i].cumulativeWei);
            previous = payer;
        }
        token.safeTransfer(distributor, totalWei);
    }

    function requestWithdrawal(uint256 amountWei) external {
        PayerState storage payer = _payers[msg.sender];
        uint256 balanceWei = payer.depositedWei - payer.capturedWei;
        if (amountWei > balanceWei) revert WithdrawalExceedsBalance(msg.sender, amountWei, balanceWei);
        _requireWholeGwei(amountWei);
        payer.withdrawingWei = uint128(amountWei); // fits: at most the balance
        payer.withdrawableAt = amountWei == 0 ? 0 : uint64(block.timestamp) + withdrawalDelay;
        emit WithdrawalRequested(msg.sender, amountWei, payer.withdrawableAt);
    }

    function withdraw() external {
        PayerState storage payer = _payers[msg.sender];
        uint64 withdrawableAt = payer.withdrawableAt;
        if (withdrawableAt == 0 || block.timestamp < withdrawableAt) {
            revert WithdrawalNotReady(msg.sender, withdrawableAt, block.timestamp);
        }
        uint128 balanceWei = payer.depositedWei - payer.capturedWei;
        uint128 amountWei = payer.withdrawingWei < balanceWei ? payer.withdrawingWei : balanceWei;
        payer.withdrawingWei = 0;
        payer.withdrawableAt = 0;
        payer.depositedWei -= amountWei;
        emit Withdrawn(msg.sender, amountWei, payer.depositedWei);
        token.safeTransfer(msg.sender, amountWei);
    }

    function payerState(address payer) external view returns (PayerState memory) {
        return _payers[payer];
    }

    function ceilingDigest(SpendCeiling calldata ceiling) public view returns (bytes32) {
        return _hashTypedDataV4(
            keccak256(
                abi.encode(
                    CEILING_TYPEHASH, ceiling.payer, ceiling.operator, ceiling.cumulativeMaxWei, ceiling.expiry
                )
            )
        );
    }

    function _deposit(address payer, address from, uint256 amountWei) private {
        _requireWholeGwei(amountWei);
        uint128 depositedWei = _payers[payer].depositedWei + amountWei.toUint128();
        _payers[payer].depositedWei = depositedWei;
        emit Deposited(payer, from, amountWei, depositedWei);
        token.safeTransferFrom(from, address(this), amountWei);
    }

    function _capture(uint64 batchId, address payer, uint256 cumulativeWei) private returns (uint256 amountWei) {
        PayerState storage state = _payers[payer];
        uint128 capturedWei = state.capturedWei;
        _requireWholeGwei(cumulativeWei);
        if (cumulativeWei < capturedWei) revert CaptureBelowPrevious(payer, cumulativeWei, capturedWei);
        if (cumulativeWei > state.ceilingWei) revert CeilingExceeded(payer, cumulativeWei, state.ceilingWei);
        if (cumulativeWei > state.depositedWei) revert DepositExceeded(payer, cumulativeWei, state.depositedWei);
        if (state.expiry < block.timestamp) revert CeilingExpired(payer, state.expiry, block.timestamp);
        state.capturedWei = uint128(cumulativeWei); // fits: at most the deposit
        amountWei = cumulativeWei - capturedWei;
        emit Captured(payer, batchId, amountWei, cumulativeWei);
    }

    /// @dev The key's own signature counts whatever code its account has taken on meanwhile (EIP-7702): a payer
    /// cannot unsign what was served already.
    function _isSigned(address payer, bytes32 digest, bytes calldata signature) private view returns (bool) {
        (address signer, ECDSA.RecoverError fault,) = ECDSA.tryRecoverCalldata(digest, signature);
        if (fault == ECDSA.RecoverError.NoError && signer == payer) return true;
        return SignatureChecker.isValidERC1271SignatureNow(payer, digest, signature);
    }

    function _requireWholeGwei(uint256 amountWei) private pure {
        if (amountWei % 1 gwei != 0) revert NotWholeGwei(amountWei);
    }
}
