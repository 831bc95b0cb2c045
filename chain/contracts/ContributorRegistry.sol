// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {IContributorRegistry} from "./IContributorRegistry.sol";

contract ContributorRegistry is IContributorRegistry {
    mapping(bytes32 contributorId => address wallet) public walletOf;

    function register(address[] calldata wallets) external {
        for (uint256 i; i < wallets.length; ++i) {
            address wallet = wallets[i];
            bytes32 contributorId = contributorIdOf(wallet);
            if (wallet == address(0)) revert ZeroWallet(contributorId);
            if (walletOf[contributorId] != address(0)) continue;
            walletOf[contributorId] = wallet;
            emit Registered(contributorId, wallet);
        }
    }

    function rotate(bytes32 contributorId, address newWallet) external {
        address oldWallet = walletOf[contributorId];
        if (oldWallet == address(0)) revert NotRegistered(contributorId);
        if (msg.sender != oldWallet) revert NotTheWallet(contributorId, oldWallet, msg.sender);
        if (newWallet == address(0)) revert ZeroWallet(contributorId);
        walletOf[contributorId] = newWallet;
        emit Rotated(contributorId, oldWallet, newWallet);
    }

    function contributorIdOf(address wallet) public pure returns (bytes32) {
        return keccak256(abi.encodePacked(uint32(24), "openledger/contributor/1", wallet));
    }
}
